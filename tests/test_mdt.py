"""MDT: the bias of distances, and its attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdit_jax.models.blocks import attend
from maskdit_jax.models.masking import random_mask
from maskdit_jax.models.mdt import distance_bias


@pytest.mark.slow
def test_bias_of_distances_is_of_rows_and_columns_query_minus_key_and_its_gradient_counts_the_pairs():
    grid, heads = 3, 2
    rows, columns = np.divmod(np.arange(grid**2), grid)
    row, column = (x[:, None] - x[None] + grid - 1 for x in (rows, columns))
    index = row * (2 * grid - 1) + column  # [N, N]
    table = np.random.default_rng(0).standard_normal(((2 * grid - 1) ** 2, heads)).astype(np.float32)
    expected = table[index].transpose(2, 0, 1)
    np.testing.assert_array_equal(distance_bias(table, grid, None)[0], expected)
    mask = random_mask(jax.random.uniform(jax.random.key(0), (2, grid**2)), 5)
    kept = distance_bias(table, grid, mask)
    for sample, ids in zip(kept, np.asarray(mask.keep_ids), strict=True):
        np.testing.assert_array_equal(sample, expected[:, ids][:, :, ids])
    counts = jax.jit(jax.grad(lambda table: distance_bias(table, grid, None).sum()))(table)
    np.testing.assert_array_equal(counts[:, 0], np.bincount(index.ravel(), minlength=len(table)))


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_biased_attention_is_softmax_of_the_sum(batch):
    """For all samples the same bias, or for each its own."""
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value = (jax.random.normal(k, (2, 5, 3, 4)) for k in keys[:3])
    bias = jax.random.normal(keys[3], (batch, 3, 5, 5))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2 + bias
    expected = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    np.testing.assert_allclose(attend(query, key, value, lambda: bias), expected, atol=1e-6)
