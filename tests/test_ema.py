"""The average of the weights follows them as the authors' does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import GOLDEN

from maskdit_jax.training.ema import ema_decay_at, update_ema


@pytest.mark.parametrize("decay", [0.999, 0.9999])
def test_warmup_and_the_average_of_a_thousand_updates(decay):
    """Of weights sin(0.01·n): the average after each update n, and the decay there and much later."""
    golden = {
        k.split("/")[1]: v for k, v in np.load(GOLDEN / "maskdm_ema.npz").items() if f"beta{decay}/" in k
    }
    decay_at = jax.jit(jax.vmap(lambda n: ema_decay_at("warmup", decay, n)))

    updates = np.arange(1, 1501)
    expected = np.where(updates == 102, 0, golden["decay_at_update"])  # there the weights are copied as well
    np.testing.assert_allclose(decay_at(jnp.asarray(updates)), expected, rtol=0, atol=1e-6)
    late = golden["probe_updates_done"] > 102
    probes = jnp.asarray(golden["probe_updates_done"][late], jnp.int32)
    np.testing.assert_allclose(decay_at(probes), golden["probe_decay"][late], rtol=0, atol=1e-6)

    def update(ema, inputs):
        n, weights = inputs
        ema = update_ema(ema, weights, ema_decay_at("warmup", decay, n))
        return ema, ema

    weights = np.sin(0.01 * updates).astype(np.float32)
    _, averages = jax.lax.scan(update, jnp.float32(5.0), (jnp.asarray(updates), jnp.asarray(weights)))
    np.testing.assert_allclose(averages, golden["ema_after_update"], rtol=0, atol=3e-6)
    np.testing.assert_array_equal(averages[:102], weights[:102])


def test_constant_rule_has_its_decay_from_the_first_update():
    ema, weights = {"a": jnp.float32(2.0)}, {"a": jnp.float32(3.0)}
    assert update_ema(ema, weights, ema_decay_at("constant", 0.75, jnp.int32(1))) == {"a": 2.25}


@pytest.mark.parametrize("decay", [0.0, jnp.float32(0.0)], ids=["number", "array"])
def test_decay_zero_is_the_weights_themselves(decay):
    """To the last bit: e + (p - e) would not be."""
    e, p = jax.random.normal(jax.random.key(0), (2, 1000)) * jnp.array([[1e3], [1.0]])
    assert (e + (p - e) != p).any()
    np.testing.assert_array_equal(jax.jit(lambda e, p: update_ema(e, p, decay))(e, p), p)
