"""MaskDM as a method: what a step draws, what the loss sees, what is refused, samples from its defaults."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskdit_jax.diffusion.ddpm import alphas_cumprod
from maskdit_jax.diffusion.guidance import NULL_LABEL
from maskdit_jax.diffusion.solvers import generate
from maskdit_jax.errors import UserError
from maskdit_jax.methods import METHODS
from maskdit_jax.methods.maskdm import MaskDM, UViTNetwork
from maskdit_jax.methods.method import Shape
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.embed import patchify
from maskdit_jax.models.masking import keep_tokens

NETWORK = UViTNetwork(size="custom", hidden_size=32, depth=2, num_heads=2, patch_size=2)
DATA = Shape(image_size=16, channels=3, num_classes=4)
KINDS = {
    "none": (64, {}),
    "patch": (20, {"mask_ratio": 0.7}),
    "block": (20, {"mask_ratio": 0.7, "block_size": 2}),
    "crop": (9, {"crop_size": 3}),
}


def method(kind: str = "block", **options) -> MaskDM:
    return METHODS["maskdm"](network=NETWORK, mask_type=kind, **KINDS[kind][1] | options)


def draws(of: MaskDM, batch_size: int = 8, seed: int = 0):
    clean = jax.random.uniform(jax.random.key(9), (batch_size, 16, 16, 3), minval=-1)
    batch = {"clean": clean, "labels": jnp.arange(batch_size) % 4}
    num_keep = of.num_keep(DATA, 0, 100)
    return batch, jax.jit(functools.partial(of.draw, num_keep=num_keep))(jax.random.key(seed), batch)


@pytest.fixture(scope="module")
def network():
    return method().build(DATA, Compute(precision="float32", unroll="none"), nnx.Rngs(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_draws_masks_of_the_count_announced(kind):
    of = method(kind)
    of.check(DATA)
    assert of.num_keep(DATA, 0, 100) == of.num_keep(DATA, 99, 100) == KINDS[kind][0]
    drawn = draws(of)[1]
    if kind == "none":
        assert drawn.mask is None
    else:
        np.testing.assert_array_equal((1 - drawn.mask.hidden).sum(axis=1), KINDS[kind][0])
        assert len(np.unique(np.asarray(drawn.mask.hidden), axis=0)) > 1


@pytest.mark.slow
def test_a_step_draws_timesteps_noise_and_dropped_labels():
    """Every timestep as often; x_t is of that timestep; the share of labels that are dropped."""
    of = method(timesteps=10, label_dropout=0.25)
    batch, drawn = draws(of, batch_size=4000)
    times, counts = np.unique(drawn.t, return_counts=True)
    np.testing.assert_array_equal(times, np.arange(10))
    np.testing.assert_allclose(counts / 4000, 0.1, atol=0.02)
    share = alphas_cumprod("cosine", 10)[drawn.t][:, None, None, None]
    noisy = np.sqrt(share) * batch["clean"] + np.sqrt(1 - share) * drawn.noise
    np.testing.assert_allclose(drawn.noisy, noisy, rtol=0, atol=1e-5)
    assert float(drawn.noise.std()) == pytest.approx(1, abs=0.01)
    dropped = np.asarray(drawn.labels) == NULL_LABEL
    assert dropped.mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(drawn.labels[~dropped], batch["labels"][~dropped])
    assert (draws(of, batch_size=8, seed=1)[1].t != drawn.t[:8]).any()


@pytest.mark.slow
def test_loss_is_of_the_visible_patches_alone(network):
    """What is hidden changes nothing; the loss is the mean squared error of what the network predicts."""
    of = method("block")
    drawn = draws(of)[1]
    loss = jax.jit(lambda d: of.loss(network, d)[0])
    hidden = drawn.mask.hidden.reshape(8, 8, 8).repeat(2, axis=1).repeat(2, axis=2)[..., None]
    other = drawn._replace(noisy=drawn.noisy + 5 * hidden, noise=drawn.noise + 5 * hidden)
    np.testing.assert_array_equal(loss(other), loss(drawn))

    predicted = network(drawn.noisy, drawn.t, drawn.labels, drawn.mask)
    target = keep_tokens(patchify(drawn.noise, 2), drawn.mask)
    expected = ((np.asarray(predicted) - np.asarray(target)) ** 2).mean(axis=(1, 2))
    np.testing.assert_allclose(loss(drawn), expected, rtol=1e-5)


@pytest.mark.slow
def test_samples_by_the_methods_own_defaults_are_in_range_and_each_from_its_seed(network):
    of = method()
    options = dataclasses.replace(of.sampler, num_steps=4, cfg_scale=1.5)
    assert (options.solver, options.eta, options.clip) == ("ddim", 1.0, True)
    options.check("sampling.", of.noise_levels())
    sample = jax.jit(
        lambda seeds: generate(
            of.denoiser(network),
            seeds,
            jnp.zeros(len(seeds), jnp.int32),
            (16, 16, 3),
            options,
            levels=of.noise_levels(),
        )
    )
    two = np.asarray(sample(jnp.array([5, 6], jnp.uint32)))
    assert np.abs(two).max() <= 1
    assert np.abs(two[0] - two[1]).max() > 0.1
    np.testing.assert_allclose(sample(jnp.array([6, 7], jnp.uint32))[0], two[1], rtol=0, atol=1e-4)


def test_network_of_a_named_size():
    filled = UViTNetwork(size="S/4")
    assert (filled.hidden_size, filled.depth, filled.num_heads, filled.patch_size) == (512, 13, 8, 4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "block", "block_size": 3}, ["method.block_size=3", "8×8 patches"]),
        ({"kind": "crop", "crop_size": 9}, ["method.crop_size=9", "at most 8"]),
        ({"kind": "patch", "mask_ratio": 1.0}, ["method.mask_ratio=1.0", "all 64", "at most 0.984"]),
        ({"kind": "block", "mask_ratio": 1.0}, ["method.mask_ratio=1.0", "all 64"]),
        ({"noise_schedule": "linear", "timesteps": 20}, ["method.timesteps=20", "at least 21", "cosine"]),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_in_one_line(options, named):
    with pytest.raises(UserError) as refused:
        method(**options).check(DATA)
    assert all(part in str(refused.value) for part in named)
    assert "\n" not in str(refused.value)


def test_the_fewest_timesteps_that_the_refusal_names_are_enough():
    method(noise_schedule="linear", timesteps=21).check(DATA)


@pytest.mark.parametrize("size", ["XL/4", "B/2"])
def test_unknown_size_lists_the_known_ones(size):
    with pytest.raises(UserError, match=rf"method.network.size='{size}' is unknown; known: S, B followed by"):
        UViTNetwork(size=size)
