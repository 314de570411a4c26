"""Masks: how many patches each kind hides, and which."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import GOLDEN

from maskdit_jax.models.masking import (
    TokenMask,
    block_mask,
    count_visible_patches,
    crop_mask,
    keep_pairs,
    keep_tokens,
    random_mask,
    restore_tokens,
    sum_pairs_at_once,
    sum_pairs_in_turn,
)

COUNTS = json.loads((GOLDEN / "maskdm_mask_counts.json").read_text())
EXAMPLES = np.load(GOLDEN / "maskdm_mask_examples.npz")
# As the examples are named: kind and side, grid, ratio.
KINDS = {
    "patch_16_r0.7": ("patch", 1, 16, 0.7),
    "block4_16_r0.9": ("block", 4, 16, 0.9),
    "block8_16_r0.5": ("block", 8, 16, 0.5),
    "block4_64_r0.9": ("block", 4, 64, 0.9),
    "crop5_16": ("crop", 5, 16, 0.0),
}


def count(kind: str, side: int, grid: int, ratio: float) -> int:
    return count_visible_patches(kind, grid, ratio=ratio, block_size=side, crop_size=side)


def draw(kind: str, side: int, grid: int, ratio: float, batch_size: int) -> TokenMask:
    key, num_keep = jax.random.key(3), count(kind, side, grid, ratio)
    if kind == "crop":
        corners = jax.random.randint(key, (batch_size, 2), 0, grid - side + 1)
        return jax.jit(crop_mask, static_argnums=(1, 2))(corners, grid, side)
    uniform = jax.random.uniform(key, (batch_size, (grid // side) ** 2))
    if kind == "block":
        return jax.jit(block_mask, static_argnums=(1, 2, 3))(uniform, grid, side, num_keep)
    return random_mask(uniform, num_keep)


def test_counts_are_the_authors_for_every_kind_ratio_and_grid():
    for row in COUNTS:
        side = row.get("block") or row.get("crop") or 1
        visible = count(row["kind"], side, row["grid"], row.get("ratio", 0.5))
        assert visible == row["visible"] == row["grid"] ** 2 - row["masked"], row
    assert count("none", 4, 16, 0.9) == 256


def hidden_blocks(hidden: np.ndarray, grid: int, side: int) -> np.ndarray:
    """How many patches of each aligned block are hidden, [n, (grid / side)²]."""
    blocks = hidden.reshape(len(hidden), grid // side, side, grid // side, side)
    return blocks.sum(axis=(2, 4)).reshape(len(hidden), -1)


def is_a_window(visible: np.ndarray, side: int) -> bool:
    """Of one mask, [grid, grid]."""
    rows, columns = visible.any(axis=1), visible.any(axis=0)
    ends = [(np.flatnonzero(x)[0], np.flatnonzero(x)[-1]) for x in (rows, columns)]
    return all(last - first + 1 == side for first, last in ends) and visible.sum() == side**2


@pytest.mark.parametrize("name", EXAMPLES.files)
def test_masks_are_of_the_kind_of_the_authors_examples(name):
    """Theirs and ours: the count in every one of them, whole aligned blocks, one whole window."""
    kind, side, grid, ratio = KINDS[name]
    mask = draw(kind, side, grid, ratio, batch_size=8)
    for hidden in (EXAMPLES[name], np.asarray(mask.hidden) == 1):
        assert set((~hidden).sum(axis=1)) == {count(kind, side, grid, ratio)}
        assert len(np.unique(hidden, axis=0)) > 1
        if kind == "block":
            assert set(hidden_blocks(hidden, grid, side).ravel()) == {0, side**2}
        if kind == "crop":
            assert all(is_a_window(~one.reshape(grid, grid), side) for one in hidden)


@pytest.mark.parametrize("kind", [("patch", 1, 8, 0.7), ("block", 2, 8, 0.7), ("crop", 3, 8, 0.0)])
def test_mask_holds_each_token_once_and_brings_it_back(kind):
    mask, tokens = draw(*kind, batch_size=4), jax.random.normal(jax.random.key(0), (4, 64, 3))
    np.testing.assert_array_equal(np.sort(mask.shuffle_ids), np.tile(np.arange(64), (4, 1)))
    np.testing.assert_array_equal(mask.keep_ids, mask.shuffle_ids[:, : count(*kind)])
    there_and_back = jnp.take_along_axis(mask.shuffle_ids, mask.restore_ids, axis=1)
    np.testing.assert_array_equal(there_and_back, np.tile(np.arange(64), (4, 1)))
    restored = restore_tokens(keep_tokens(tokens, mask), mask, jnp.zeros(3))
    np.testing.assert_array_equal(restored, tokens * (1 - mask.hidden)[:, :, None])


def test_every_block_and_every_window_has_the_same_chance():
    blocks = draw("block", 2, 8, 0.5, batch_size=4000)
    share = hidden_blocks(np.asarray(blocks.hidden), 8, 2).mean(axis=0) / 4
    np.testing.assert_allclose(share, 0.5, atol=0.05)
    corners = np.asarray(draw("crop", 6, 8, 0.0, batch_size=4000).keep_ids)[:, 0]
    places, times = np.unique(corners, return_counts=True)
    np.testing.assert_array_equal(places, [8 * row + column for row in range(3) for column in range(3)])
    np.testing.assert_allclose(times / 4000, 1 / 9, atol=0.03)


@pytest.mark.slow
def test_pairs_of_visible_tokens_and_the_gradient_that_autodiff_gives_them():
    """Both ways of summing it, whichever this device takes."""
    mask = draw("patch", 1, 3, 0.4, batch_size=4)
    keys = jax.random.split(jax.random.key(0))
    pairs, weights = jax.random.normal(keys[0], (2, 9, 9)), jax.random.normal(keys[1], (4, 2, 6, 6))
    ids = mask.keep_ids

    def value_and_grad(keep):
        return jax.jit(jax.value_and_grad(lambda pairs: (weights * keep(pairs) ** 2).sum()))(pairs)

    expected, gradient = value_and_grad(
        lambda pairs: jnp.moveaxis(pairs[:, ids[:, :, None], ids[:, None]], 0, 1)
    )
    value, actual = value_and_grad(lambda pairs: keep_pairs(pairs, mask))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(actual, gradient, rtol=1e-5)
    in_turn, at_once = (f(weights, ids, mask.restore_ids) for f in (sum_pairs_in_turn, sum_pairs_at_once))
    np.testing.assert_allclose(in_turn, at_once, rtol=1e-5, atol=1e-6)
