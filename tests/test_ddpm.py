"""DDPM's schedules, its forward process, and samples of a closed-form network, as the authors have them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import GOLDEN, channels_last

from maskdit_jax.diffusion.ddpm import (
    NOISE_SCHEDULES,
    alphas_cumprod,
    diffuse,
    epsilon_denoiser,
    noise_levels,
    timestep_of,
)
from maskdit_jax.diffusion.edm import per_sample
from maskdit_jax.diffusion.solvers import (
    SOLVERS,
    SamplerOptions,
    generate,
    integrate,
    noise_grid,
    timestep_grid,
)

SCHEDULES = np.load(GOLDEN / "maskdm_schedules.npz")
SAMPLERS = np.load(GOLDEN / "maskdm_samplers.npz")
SAMPLER_CASES = json.loads((GOLDEN / "maskdm_info.json").read_text())["samplers"]


def posterior(schedule: str, timesteps: int) -> dict[str, np.ndarray]:
    """DDPM's posterior q(x_{t-1} | x_t, clean), from how our ancestral solver steps."""
    alpha_bar = alphas_cumprod(schedule, timesteps)
    before = np.append(1.0, alpha_bar[:-1])
    # The table of a solver falls.
    levels = np.append(0.0, noise_levels(schedule, timesteps))[::-1]
    ((_, rows),) = SOLVERS["ancestral"].plan(levels, SamplerOptions())
    down_over_sigma, sigma_up = rows.weights[::-1, 0], rows.after[::-1]
    variance = before * sigma_up**2
    return {
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": np.sqrt(before) * (1 - down_over_sigma),
        "posterior_mean_coef2": np.sqrt(before / alpha_bar) * down_over_sigma,
    }


@pytest.mark.parametrize("name", ["linear1000", "linear50", "cosine1000", "cosine50"])
def test_schedules(name):
    schedule, timesteps = name[:6], int(name[6:])
    betas, alpha_bar = NOISE_SCHEDULES[schedule](timesteps), alphas_cumprod(schedule, timesteps)
    np.testing.assert_allclose(betas, SCHEDULES[f"{name}/betas_f64"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(alpha_bar, SCHEDULES[f"{name}/alphas_cumprod_f64"], rtol=0, atol=1e-12)
    ours = posterior(schedule, timesteps) | {
        "alphas_cumprod": alpha_bar,
        "sqrt_alphas_cumprod": np.sqrt(alpha_bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alpha_bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alpha_bar),
        "sqrt_recipm1_alphas_cumprod": noise_levels(schedule, timesteps),
    }
    tables = {key.split("/")[1] for key in SCHEDULES.files if key.startswith(f"{name}/")}
    assert tables == {*ours, "betas_f64", "alphas_cumprod_f64"}
    for key, table in ours.items():
        np.testing.assert_allclose(table, SCHEDULES[f"{name}/{key}"], rtol=1e-6, err_msg=key)


def test_forward_process_and_posterior():
    """At t = 0, 1, 500 and 999 of the cosine schedule."""
    golden = {key[2:]: SCHEDULES[key] for key in SCHEDULES.files if key.startswith("q/")}
    images = {key: channels_last(x) for key, x in golden.items() if x.ndim == 4}
    clean, noise, t = images["x0"], images["noise"], golden["t"]
    alpha_bar, coefficients = alphas_cumprod("cosine", 1000), posterior("cosine", 1000)
    levels = noise_levels("cosine", 1000)
    x_t = np.asarray(diffuse(jnp.asarray(clean), jnp.asarray(noise), jnp.asarray(t), alpha_bar))

    def at(table):
        return table[t][:, None, None, None]

    x, sigma = images["x_t"] * np.sqrt(1 + at(levels) ** 2), levels[t]
    denoise = epsilon_denoiser(lambda x, t, labels: jnp.asarray(noise), levels)
    ours = {
        "x_t": x_t,
        "v_target": np.sqrt(at(alpha_bar)) * noise - np.sqrt(1 - at(alpha_bar)) * clean,
        "posterior_mean": at(coefficients["posterior_mean_coef1"]) * clean
        + at(coefficients["posterior_mean_coef2"]) * images["x_t"],
        "posterior_variance": at(coefficients["posterior_variance"]),
        "posterior_log_variance": at(coefficients["posterior_log_variance_clipped"]),
        "x0_from_noise": np.asarray(denoise(*(jnp.asarray(a, jnp.float32) for a in (x, sigma)), None)),
    }
    assert set(ours) == set(images) - {"x0", "noise"}
    for key, value in ours.items():
        for i, (row, expected) in enumerate(zip(value, images[key], strict=True)):
            atol = 1e-5 * np.abs(expected).max()
            if key == "x0_from_noise":  # a difference of two numbers of 2e4 at t = 999
                atol = max(atol, np.finfo(np.float32).eps * np.abs(x[i]).max())
            np.testing.assert_allclose(row, expected, rtol=0, atol=atol, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("timesteps", [1000, 4000])
def test_network_gets_the_very_timesteps_it_was_trained_on(schedule, timesteps):
    """And between two of them what lies between, outside of all the nearest."""
    levels = noise_levels(schedule, timesteps)
    exact = jax.jit(lambda sigma: timestep_of(sigma, levels))
    np.testing.assert_array_equal(exact(jnp.asarray(levels, jnp.float32)), np.arange(timesteps))
    middle = np.sqrt(levels[1:] * levels[:-1])
    np.testing.assert_allclose(
        exact(jnp.asarray(middle, jnp.float32)), np.arange(timesteps - 1) + 0.5, atol=0.02
    )
    outside = jnp.asarray([levels[0] / 10, levels[-1] * 10], jnp.float32)
    np.testing.assert_array_equal(exact(outside), [0, timesteps - 1])


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_noise_predictor_is_the_exact_denoiser_at_every_noise_level(schedule):
    """Of data N(0, s²), of which the best prediction of the noise at timestep t is known."""
    levels, s = noise_levels(schedule, 1000), 0.5

    def network(x, t, labels):
        sigma = per_sample(jnp.exp(jnp.interp(t, jnp.arange(1000.0), jnp.log(levels))))
        return x * jnp.sqrt(1 + sigma**2) * sigma / (s**2 + sigma**2)

    sigma = jnp.exp(jnp.linspace(np.log(levels[0]), np.log(80.0), 57))
    x = sigma[:, None, None, None] * jnp.ones((57, 2, 2, 1))
    denoised = jax.jit(epsilon_denoiser(network, levels))(x, sigma, jnp.zeros(57, jnp.int32))
    np.testing.assert_allclose(denoised, x * per_sample(s**2 / (s**2 + sigma**2)), rtol=2e-3, atol=5e-5)


@pytest.mark.parametrize("steps", [250, 500])
def test_times_of_a_sampler(steps):
    times = timestep_grid(steps, np.arange(1.0, 1001)) - 1
    np.testing.assert_array_equal(times[:-1], SAMPLERS[f"times_ddim{steps}"])


def _denoiser_of(objective: str, network, levels):
    """As MaskDM makes one of a network that predicts noise; of clean data and v the authors clip before."""
    if objective == "pred_noise":
        return epsilon_denoiser(network, levels)

    def denoise(x, sigma, labels):
        s = per_sample(sigma)
        predicted = network(x / jnp.sqrt(1 + s**2), timestep_of(sigma, levels), labels)
        if objective == "pred_v":
            predicted = (x / (1 + s**2)) - s / jnp.sqrt(1 + s**2) * predicted
        return jnp.clip(predicted, -1, 1)

    return denoise


@pytest.mark.parametrize("name", SAMPLER_CASES)
def test_sampler(name):
    """The times and inputs of each call of the network, and the sample, in DDPM's scaling."""
    case = SAMPLER_CASES[name]
    golden = {key.split("/")[1]: SAMPLERS[key] for key in SAMPLERS.files if key.startswith(f"{name}/")}
    levels, seen = noise_levels(case["schedule"], case["timesteps"]), []

    def network(x, t, labels):
        jax.debug.callback(lambda *call: seen.append(call), x, t[0], ordered=True)
        return jnp.tanh(0.5 * x + 0.001 * t[:, None, None, None])

    options = SamplerOptions(
        num_steps=case.get("steps", case["timesteps"]),
        solver={"ddim": "ddim", "ancestral": "ancestral"}[case["kind"]],
        grid="timesteps",
        eta=case.get("eta", 0.0),
        clip=case["clip_denoised"],
    )
    sigmas = noise_grid(options, levels)
    # Ours starts from sigma·noise, DDPM from noise that is √(1 + sigma²) / sigma as wide.
    start = channels_last(SAMPLERS["xT"]) * np.sqrt(1 + sigmas[0] ** 2) / sigmas[0]
    denoise = _denoiser_of(case.get("objective", "pred_noise"), network, levels)
    noise = jnp.asarray(golden["noise"].transpose(0, 1, 3, 4, 2)) if "noise" in golden else None
    end = integrate(
        denoise, jnp.asarray(start, jnp.float32), jnp.zeros(2, jnp.int32), sigmas, options, lambda i: noise[i]
    )
    jax.effects_barrier()

    tolerance = 3e-4 if name == "ddim10_eta1_clip" else 2e-5
    assert_close_to_largest((np.asarray(end) + 1) / 2, channels_last(golden["final"]), tolerance)
    np.testing.assert_array_equal([t for _, t in seen], golden["times"])
    for step, expected in zip(golden["step_index"], golden["x_before_step"], strict=True):
        assert_close_to_largest(seen[step][0], channels_last(expected), tolerance)


def assert_close_to_largest(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["edm", "timesteps"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_and_grid_samples_a_gaussian_with_a_noise_predictor(solver, grid):
    """Data N(0, 0.5²), whose best predictor is known at every t: samples have that spread, whatever steps."""
    std, levels = 0.5, noise_levels("cosine", 1000)
    alpha_bar = jnp.asarray(1 / (1 + levels**2), jnp.float32)

    def network(x, t, labels):
        signal = jnp.interp(t, jnp.arange(1000.0), alpha_bar)[:, None, None, None]
        return jnp.sqrt(1 - signal) * x / (signal * std**2 + 1 - signal)

    options = SamplerOptions(solver=solver, grid=grid, num_steps=60, eta=0.5, cfg_scale=1.0)
    options.check("", levels)
    sample = jax.jit(
        lambda seeds: generate(
            epsilon_denoiser(network, levels), seeds, jnp.zeros(len(seeds), jnp.int32), (16, 16, 1), options,
            levels=levels,
        )
    )  # fmt: skip
    samples = np.asarray(sample(jnp.arange(16, dtype=jnp.uint32)))
    assert samples.std() == pytest.approx(std, rel=0.05 if solver == "heun" else 0.15)
    assert abs(samples.mean()) < 0.05
