"""DDPM with a learned variance: its tables, loss terms and trajectories, as the authors have them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import GOLDEN, channels_last
from golden_maskdm import assert_close

from maskdit_jax.diffusion.ddpm import alphas_cumprod, diffuse, linear_betas, noise_levels
from maskdit_jax.diffusion.learned_variance import noise_and_variance_loss, posterior, variance_denoiser
from maskdit_jax.diffusion.solvers import SamplerOptions, integrate, noise_grid
from maskdit_jax.errors import UserError

ARRAYS = np.load(GOLDEN / "fbdit_diffusion.npz")
TRAJECTORIES = json.loads((GOLDEN / "fbdit_info.json").read_text())["diffusion"]
BETAS = linear_betas(1000)
# The settings of a golden as options here. DDIM of eta 1 that goes by the clipped estimate is the ancestral
# step with the least variance.
OPTIONS = {
    "ddpm": {"solver": "ancestral", "grid": "respaced"},
    "ddim10_noclip": {"solver": "ddim", "grid": "strided"},
    "ddim10_eta1_clip": {"solver": "ancestral", "grid": "strided"},
}


def network(x, t, labels):
    """The goldens' stand-in: noise and variance's value [B, H, W, 2C]."""
    t = t[:, None, None, None].astype(x.dtype)
    return jnp.concatenate([jnp.tanh(0.5 * x + 0.001 * t), 0.5 * jnp.sin(x + 0.002 * t)], axis=-1)


def test_tables_of_the_process_and_its_posterior():
    ours = posterior(BETAS)
    tables = {
        "betas": BETAS,
        "alphas_cumprod": alphas_cumprod("linear", 1000),
        "posterior_variance": ours.variance,
        "posterior_log_variance_clipped": ours.log_variance,
        "posterior_mean_coef1": ours.of_clean,
        "posterior_mean_coef2": ours.of_noisy,
    }
    assert {f"linear1000/{name}" for name in tables} == {
        k for k in ARRAYS.files if k.startswith("linear1000/")
    }
    for name, table in tables.items():
        np.testing.assert_allclose(table, ARRAYS[f"linear1000/{name}"], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", ["250", "50", "10", "1", "ddim250", "ddim50", "ddim10"])
def test_shortened_processes(name):
    """Their timesteps, and betas: what is left of the data from each to the next."""
    grid, num_steps = ("strided" if "ddim" in name else "respaced"), int(name.removeprefix("ddim"))
    options = SamplerOptions(grid=grid, num_steps=num_steps)
    options.check("", noise_levels("linear", 1000))
    times = noise_grid(options, np.arange(1.0, 1001)) - 1
    assert times[-1] == -1  # the level 0
    np.testing.assert_array_equal(times[-2::-1], ARRAYS[f"respace/{name}/timesteps"])
    alpha_bar = 1 / (1 + noise_grid(options, noise_levels("linear", 1000))[::-1] ** 2)
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    np.testing.assert_allclose(betas, ARRAYS[f"respace/{name}/betas"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("golden", "timesteps"), [("respace/10,15,20/timesteps", 1000), ("respace300/10,15,20", 300)]
)
def test_sections_of_a_process_are_respaced_alike(golden, timesteps):
    """Of a third each, with numbers of their own."""
    times, start = [], 0
    for section, num_steps in zip(np.array_split(np.arange(timesteps), 3), (10, 15, 20)):
        options = SamplerOptions(grid="respaced", num_steps=num_steps)
        times += [start + t - 1 for t in noise_grid(options, np.arange(1.0, len(section) + 1))[-2::-1]]
        start += len(section)
    np.testing.assert_array_equal(times, ARRAYS[golden])


def test_a_stride_that_does_not_exist_is_refused():
    levels = noise_levels("linear", 1000)
    SamplerOptions(grid="strided", num_steps=77).check("", levels)
    with pytest.raises(
        UserError, match=r"^num_steps=78: with no stride are so many of 1,000 timesteps passed"
    ):
        SamplerOptions(grid="strided", num_steps=78).check("", levels)
    with pytest.raises(UserError, match="the method is not trained on timesteps"):
        SamplerOptions(grid="respaced").check("", None)


def test_loss_terms():
    """At t = 0, 1, 100, 600 and 999; scaled to T steps they are the same at T = 1000."""
    clean, noise = (jnp.asarray(channels_last(ARRAYS[f"hybrid/{name}"])) for name in ("x0", "noise"))
    t = jnp.asarray(ARRAYS["hybrid/t"], jnp.int32)
    noisy = diffuse(clean, noise, t, alphas_cumprod("linear", 1000))
    mse, bound = jax.jit(lambda p: noise_and_variance_loss(p, clean, noise, t, BETAS))(
        network(noisy, t, None)
    )
    for kind in ("mse", "rescaled_mse"):
        assert_close(mse, ARRAYS[f"hybrid/{kind}/mse"], 1e-5)
        assert_close(bound, ARRAYS[f"hybrid/{kind}/vb"], 1e-5)
        assert_close(mse + bound, ARRAYS[f"hybrid/{kind}/loss"], 1e-5)
    np.testing.assert_allclose(1000 * bound, ARRAYS["hybrid/kl/loss"], rtol=1e-5)


@pytest.mark.slow
def test_the_bound_teaches_the_variance_alone():
    clean, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2)) * 0.3
    t = jnp.array([0, 300, 999])
    prediction = network(diffuse(clean, noise, t, alphas_cumprod("linear", 1000)), t, None)
    bound = jax.grad(lambda p: noise_and_variance_loss(p, clean, noise, t, BETAS)[1].sum())(prediction)
    assert not np.any(bound[..., :2])
    assert np.abs(bound[..., 2:]).max(axis=(1, 2, 3)).min() > 0
    assert np.isfinite(bound).all()


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory(name):
    """x and the estimate of clean data after every step, in DDPM's scaling."""
    case = TRAJECTORIES[name]
    levels, seen = noise_levels("linear", case.get("diffusion_steps", 1000)), []
    clip, learned = case["clip_denoised"], case["learn_sigma"] and name != "ddim10_eta1_clip"
    options = OPTIONS.get(name) or OPTIONS[case["kind"]]
    options = SamplerOptions(**options, num_steps=10, clip=clip)
    options.check("", levels)
    whole = variance_denoiser(network, levels)

    def denoise(x, sigma, labels):
        prediction = whole(x, sigma, labels)
        clean = prediction[..., :4]
        scaled = x / jnp.sqrt(1 + sigma**2)[:, None, None, None]
        jax.debug.callback(
            lambda *call: seen.append(call), scaled, jnp.clip(clean, -1, 1) if clip else clean, ordered=True
        )
        if "fixedlarge" in name:  # all of the logarithm is that of beta
            return jnp.concatenate([clean, jnp.ones_like(clean)], axis=-1)
        return prediction if learned else clean

    sigmas = noise_grid(options, levels)
    start = channels_last(ARRAYS["xT"]) * np.sqrt(1 + sigmas[0] ** 2) / sigmas[0]
    noise = ARRAYS[f"{name}/noise"].transpose(0, 1, 3, 4, 2) if f"{name}/noise" in ARRAYS else np.zeros(10)
    end = integrate(
        denoise,
        jnp.asarray(start, jnp.float32),
        jnp.zeros(2, jnp.int32),
        sigmas,
        options,
        lambda i: jnp.asarray(noise)[i],
    )
    jax.effects_barrier()
    samples = np.stack([*(x for x, _ in seen[1:]), end]).transpose(0, 1, 4, 2, 3)
    estimates = np.stack([clean for _, clean in seen]).transpose(0, 1, 4, 2, 3)
    for ours, theirs in ((samples, "sample"), (estimates, "pred_xstart")):
        expected = ARRAYS[f"{name}/{theirs}"]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=theirs)
