"""Grids and solvers: the authors' trajectories, and data whose exact path is known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import GOLDEN, assert_close_to_rms, channels_last

from maskdit_jax.diffusion.edm import coefficients
from maskdit_jax.diffusion.guidance import guide
from maskdit_jax.diffusion.solvers import (
    SOLVERS,
    SamplerOptions,
    count_denoiser_calls,
    generate,
    integrate,
    noise_grid,
    sigma_grid,
    timestep_grid,
)
from maskdit_jax.errors import UserError

SHAPE = (4, 4, 3)
LABELS = jnp.zeros(2, jnp.int32)
DATA_STD = 0.5


def gaussian(x, sigma, labels):
    """The exact denoiser of data N(0, DATA_STD²): x·s² / (s² + sigma²)."""
    return x * (DATA_STD**2 / (DATA_STD**2 + sigma**2))[:, None, None, None]


def too_wide(x, sigma, labels):
    """A denoiser whose estimates leave -1 … 1."""
    return 6 * gaussian(x, sigma, labels)


def unit_noise(step: int = -1) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), 1 + step), (2, *SHAPE))


def _sampler_cases():
    info = json.loads(str(np.load(GOLDEN / "samplers_edm.npz")["config_json"]))
    return list(info["cases"].items())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("tag", "settings"), _sampler_cases())
def test_sampler_trajectory(tag, settings, dtype):
    """The EDM sampler on a closed-form denoiser: the grid, the levels visited, the end point."""
    golden = np.load(GOLDEN / "samplers_edm.npz")
    visited = []

    def denoise(x, sigma, labels):
        jax.debug.callback(lambda s: visited.append(float(s)), sigma[0], ordered=True)
        s = sigma[:, None, None, None]
        c_skip, c_out, c_in, c_noise = coefficients(s, 0.5)
        label = labels[:, None, None, None].astype(x.dtype)
        return c_skip * x + c_out * jnp.tanh(0.7 * c_in * x + 0.01 * (label + 1) + 0.2 * c_noise)

    labels = golden["class_index"] if settings["class_labels"] else np.full(2, -1, np.int32)
    grid = {k: settings[k] for k in ("num_steps", "sigma_min", "sigma_max", "rho") if k in settings}
    churn = {k: v for k, v in settings.items() if k.startswith("S_")}
    sigmas = sigma_grid(**grid)
    np.testing.assert_allclose(sigmas[:-1], golden[f"{tag}__sigma_steps"], rtol=1e-9)
    with jax.enable_x64(dtype == "float64"):
        noise = jnp.asarray(channels_last(golden["latents"]), dtype)
        churn_noise = jnp.asarray(golden["noise"].transpose(0, 1, 3, 4, 2), dtype)
        denoise = guide(denoise, settings.get("cfg_scale", 1.0))
        options = SamplerOptions(**churn)
        end = integrate(denoise, noise, jnp.asarray(labels), sigmas, options, lambda i: churn_noise[i])
        end = np.asarray(end)
    assert end.dtype == dtype
    if dtype == "float64":
        np.testing.assert_allclose(end, channels_last(golden[f"{tag}__x_final_f64"]), rtol=1e-9, atol=1e-9)
    else:
        assert_close_to_rms(end, channels_last(golden[f"{tag}__x_final"]), 1e-4)
    jax.effects_barrier()
    # A callback may round what it hands over to float32.
    np.testing.assert_allclose(visited, golden[f"{tag}__net_sigmas"], rtol=1e-6)


def _error_on_gaussian_data(solver: str, num_steps: int) -> float:
    """Relative error; the exact path is x(sigma) = x(sigma_max)·√((s² + sigma²) / (s² + sigma_max²))."""
    with jax.enable_x64(True):
        noise = jnp.asarray(unit_noise(), "float64")
        end = integrate(gaussian, noise, LABELS, sigma_grid(num_steps), SamplerOptions(solver=solver))
        exact = 80 * noise * DATA_STD / np.sqrt(DATA_STD**2 + 80**2)
        return float(jnp.linalg.norm(end - exact) / jnp.linalg.norm(exact))


@pytest.mark.parametrize(("solver", "falls"), [("heun", 4), ("euler", 2)])
def test_error_falls_with_the_order_of_the_solver_when_steps_double(solver, falls):
    coarse, fine = (_error_on_gaussian_data(solver, num_steps) for num_steps in (36, 72))
    assert coarse / fine == pytest.approx(falls, rel=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_denoiser_calls_are_as_many_as_reported(solver):
    calls = []

    def counting(x, sigma, labels):
        jax.debug.callback(lambda _: calls.append(1), sigma[0], ordered=True)
        return gaussian(x, sigma, labels)

    for num_steps in (1, 7):
        integrate(
            counting, unit_noise(), LABELS, sigma_grid(num_steps), SamplerOptions(solver=solver), unit_noise
        )
        jax.effects_barrier()
        assert len(calls) == count_denoiser_calls(num_steps, solver)
        calls.clear()


def test_ddim_without_noise_is_euler():
    options = [SamplerOptions(solver="ddim", eta=0.0), SamplerOptions(solver="euler")]
    ddim, euler = (integrate(gaussian, unit_noise(), LABELS, sigma_grid(12), o) for o in options)
    np.testing.assert_allclose(ddim, euler, rtol=1e-4, atol=1e-5)


def test_ancestral_is_ddim_with_all_its_noise_unless_estimates_are_clipped():
    def end(**options):
        options = SamplerOptions(**options)
        return np.asarray(integrate(too_wide, unit_noise(), LABELS, sigma_grid(12), options, unit_noise))

    np.testing.assert_allclose(end(solver="ancestral"), end(solver="ddim", eta=1.0), rtol=1e-5, atol=1e-6)
    clipped = end(solver="ancestral", clip=True), end(solver="ddim", eta=1.0, clip=True)
    assert np.abs(clipped[0] - clipped[1]).max() > 1e-3


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_stochastic_step_keeps_the_variance_of_the_noise(eta):
    """Of data that is one point, x at every level is normal with that level's sigma around it."""
    levels = SOLVERS["ddim"].levels(sigma_grid(9), SamplerOptions(eta=eta))
    variance = levels.sigma_next**2 + levels.added**2
    np.testing.assert_allclose(variance, sigma_grid(9)[1:] ** 2, rtol=1e-12)
    assert (levels.added[:-1] > 0).all()
    assert levels.added[-1] == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_clipped_samples_stay_in_range(solver):

    def end(clip):
        options = SamplerOptions(solver=solver, clip=clip, eta=0.5)
        return np.abs(integrate(too_wide, unit_noise(), LABELS, sigma_grid(6), options, unit_noise)).max()

    assert end(clip=False) > 1.5
    assert end(clip=True) <= 1 + 1e-5


def test_timestep_grid_visits_the_method_s_own_levels():
    levels = np.arange(1.0, 1001)  # the level of timestep t is t + 1
    np.testing.assert_array_equal(timestep_grid(10, levels), [*range(1000, 0, -100), 0])
    np.testing.assert_array_equal(timestep_grid(7, levels), [1000, 857, 714, 571, 428, 285, 142, 0])
    np.testing.assert_array_equal(timestep_grid(1000, levels), np.arange(1000, -1, -1))
    options = SamplerOptions(num_steps=10, grid="timesteps")
    np.testing.assert_array_equal(noise_grid(options, levels), timestep_grid(10, levels))


@pytest.mark.parametrize("solver", ["ddim", "ancestral"])
def test_each_image_s_noise_is_from_its_own_seed(solver):
    """Alone or in a batch, and at every step."""
    options = SamplerOptions(num_steps=5, solver=solver, eta=1.0, cfg_scale=1.0)

    def sample(*seeds):
        seeds = jnp.array(seeds, jnp.uint32)
        return np.asarray(generate(gaussian, seeds, jnp.zeros(len(seeds), jnp.int32), SHAPE, options))

    both = sample(3, 7)
    np.testing.assert_allclose(sample(7)[0], both[1], rtol=1e-6, atol=1e-6)
    started_alike = generate(
        gaussian, jnp.array([3, 7], jnp.uint32), LABELS, SHAPE, options, noise=jnp.ones((2, *SHAPE))
    )
    assert np.abs(started_alike[0] - started_alike[1]).max() > 0.01


@pytest.mark.parametrize(
    ("options", "levels", "named"),
    [
        ({"grid": "timesteps"}, None, ["sampling.grid='timesteps'", "not trained on timesteps", "grid=edm"]),
        ({"grid": "timesteps", "num_steps": 5}, np.arange(1.0, 5), ["sampling.num_steps=5", "at most 4"]),
        ({"grid": "vp"}, None, ["sampling.grid='vp'", "edm, timesteps"]),
        ({"eta": 1.5}, None, ["sampling.eta=1.5", "between 0 and 1"]),
        ({"clip": 1}, None, ["sampling.clip=1", "true or false"]),
        ({"S_churn": 1.0, "solver": "ddim"}, None, ["sampling.S_churn=1.0", "'ddim'", "heun or euler"]),
        ({"guidance_interval": (0.0, "1")}, None, ["sampling.guidance_interval=(0.0, '1')", "low < high"]),
    ],
    ids=str,
)
def test_what_cannot_be_sampled_with_is_refused_in_one_line(options, levels, named):
    with pytest.raises(UserError) as refused:
        SamplerOptions(**options).check("sampling.", levels)
    assert all(part in str(refused.value) for part in named)
    assert "\n" not in str(refused.value)
