"""Grids and solvers: the authors' trajectories, and data whose exact path is known."""

import json
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import GOLDEN, assert_close_to_rms, channels_last

from maskdit_jax.diffusion.edm import coefficients
from maskdit_jax.diffusion.grids import SCHEDULES, timestep_grid
from maskdit_jax.diffusion.guidance import guide, null_label_sides
from maskdit_jax.diffusion.solvers import (
    SOLVERS,
    SamplerOptions,
    Solver,
    generate,
    integrate,
    noise_grid,
    sigma_grid,
)
from maskdit_jax.diffusion.steps import Steps
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


def _cases(name):
    return json.loads(str(np.load(GOLDEN / f"{name}.npz")["config_json"]))["cases"]


def closed_form(x, sigma, labels):
    """The denoiser of the goldens."""
    s, label = sigma[:, None, None, None], labels[:, None, None, None].astype(x.dtype)
    c_skip, c_out, c_in, c_noise = coefficients(s, 0.5)
    return c_skip * x + c_out * jnp.tanh(0.7 * c_in * x + 0.01 * (label + 1) + 0.2 * c_noise)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("tag", "settings"), _cases("samplers_edm").items())
def test_sampler_trajectory(tag, settings, dtype):
    """The EDM sampler on a closed-form denoiser: the grid, the levels visited, the end point."""
    golden = np.load(GOLDEN / "samplers_edm.npz")
    visited = []

    def denoise(x, sigma, labels):
        jax.debug.callback(lambda s: visited.append(float(s)), sigma[0], ordered=True)
        return closed_form(x, sigma, labels)

    labels = golden["class_index"] if settings["class_labels"] else np.full(2, -1, np.int32)
    options = SamplerOptions(**{"cfg_scale": 1.0} | _options(settings))
    sigmas = noise_grid(options)
    np.testing.assert_allclose(sigmas[:-1], golden[f"{tag}__sigma_steps"], rtol=1e-9)
    with jax.enable_x64(dtype == "float64"):
        noise = jnp.asarray(channels_last(golden["latents"]), dtype)
        churn_noise = jnp.asarray(golden["noise"].transpose(0, 1, 3, 4, 2), dtype)
        guided = guide(null_label_sides(denoise), options.cfg_scale)
        end = integrate(
            denoise, noise, jnp.asarray(labels), sigmas, options, lambda i: churn_noise[i], guided
        )
        end = np.asarray(end)
    assert end.dtype == dtype
    if dtype == "float64":
        np.testing.assert_allclose(end, channels_last(golden[f"{tag}__x_final_f64"]), rtol=1e-9, atol=1e-9)
    else:
        assert_close_to_rms(end, channels_last(golden[f"{tag}__x_final"]), 1e-4)
    jax.effects_barrier()
    # A callback may round what it hands over to float32.
    np.testing.assert_allclose(visited, golden[f"{tag}__net_sigmas"], rtol=1e-6)


# The generalised sampler


def _vp_end(t):
    return np.sqrt(np.expm1(19.1 * t**2 / 2 + 0.1 * t))


ENDS = {"vp": (_vp_end(1e-3), _vp_end(1.0)), "ve": (0.02, 100), "iddpm": (0.002, 81), "edm": (0.002, 80)}


def _options(settings):
    """A golden's settings by our names; the ends of its noise levels go with their grid."""
    names = {"discretization": "grid"}
    given = {names.get(name, name): value for name, value in settings.items()}
    if "grid" in given:
        given |= zip(("sigma_min", "sigma_max"), ENDS[given["grid"]], strict=True)
    return {name: value for name, value in given.items() if name in SamplerOptions.__annotations__}


def _ablation_cases():
    """(tag, options, what is known of it): all 48 combinations, and others."""
    golden = np.load(GOLDEN / "samplers_ablation.npz")
    for i, name in enumerate(golden["grid__names"]):
        settings = dict(
            zip(("solver", "discretization", "schedule", "scaling"), name.split("-"), strict=True)
        )
        known = {x.removeprefix("grid__"): golden[x][i] for x in golden.files if x.startswith("grid__")}
        yield str(name), SamplerOptions(num_steps=10, cfg_scale=1.0, **_options(settings)), known
    for tag, settings in _cases("samplers_ablation").items():
        known = {x.removeprefix(f"{tag}__"): golden[x] for x in golden.files if x.startswith(f"{tag}__")}
        if tag != "grid":
            yield tag, SamplerOptions(**{"cfg_scale": 1.0} | _options(settings)), known


def test_generalised_sampler_s_noise_levels():
    """Of every call of the denoiser; the authors' own iddpm levels are of a cosine in float32."""
    for tag, options, known in _ablation_cases():
        options.check()
        plan = SOLVERS[options.solver].plan(noise_grid(options), options)
        sigmas = np.concatenate([steps.rows.sigmas.reshape(-1) for steps in plan])
        expected = known["net_sigmas"][~np.isnan(known["net_sigmas"])]
        within = 6e-4 if options.grid == "iddpm" else 1e-6
        np.testing.assert_allclose(sigmas, expected, rtol=within, err_msg=tag)


def test_grids_and_times_of_other_numbers_of_steps():
    golden = np.load(GOLDEN / "samplers_ablation.npz")
    tables = [name for name in golden.files if name.startswith("table") and f"{name}_f64" not in golden.files]
    assert len(tables) == 2 * (4 + 4 * 3)
    for name in tables:
        (steps, grid, *schedule), what = name.split("__")[0].split("-"), name.split("__")[1]
        options = SamplerOptions(
            num_steps=int(steps.removeprefix("table")), **_options({"discretization": grid})
        )
        found = noise_grid(options)
        if schedule:
            found = SCHEDULES[schedule[0]](options.sigma_min, options.sigma_max).time(found)
        found = found if what.startswith("t_steps") else found[:-1]
        np.testing.assert_allclose(found, golden[name], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_generalised_sampler(dtype, monkeypatch):
    """All solvers, grids, schedules and scalings; those that differ in numbers alone are one program."""
    golden, programs = np.load(GOLDEN / "samplers_ablation.npz"), defaultdict(list)
    for tag, options, known in _ablation_cases():
        key = options.solver, options.S_churn > 0, options.cfg_scale
        programs[key].append((tag, options, known))
    with jax.enable_x64(dtype == "float64"):
        noise = jnp.asarray(channels_last(golden["latents"]), dtype)
        churn_noise = jnp.asarray(golden["noise"].transpose(0, 1, 3, 4, 2), dtype)
        labels = jnp.asarray(golden["class_index"])
        for cases in programs.values():
            grids = [noise_grid(options) for _, options, _ in cases]
            plans = [
                SOLVERS[options.solver].plan(sigmas, options)
                for sigmas, (_, options, _) in zip(grids, cases, strict=True)
            ]
            steps, scale = [x.step for x in plans[0]], cases[0][1].cfg_scale
            denoise = guide(null_label_sides(closed_form), scale)

            def end(grid, rows, steps=steps, denoise=denoise):
                plan = [Steps(*x) for x in zip(steps, rows, strict=True)]
                monkeypatch.setitem(SOLVERS, "planned", Solver(lambda *_: plan))
                options = SamplerOptions(solver="planned", cfg_scale=1.0)
                return integrate(denoise, noise, labels, grid, options, lambda i: churn_noise[i])

            rows = jax.tree.map(lambda *each: np.stack(each), *[[x.rows for x in plan] for plan in plans])
            ends = np.asarray(jax.jit(jax.vmap(end))(np.array(grids, dtype), rows))
            assert ends.dtype == dtype
            for x, (tag, _, known) in zip(ends, cases, strict=True):
                if dtype == "float64":
                    expected = channels_last(known["x_final_f64"])
                    np.testing.assert_allclose(x, expected, rtol=1e-9, atol=1e-9, err_msg=tag)
                else:
                    assert_close_to_rms(x, channels_last(known["x_final_f64"]), 1e-4)


# Laws


def _error_on_gaussian_data(solver: str, num_steps: int) -> float:
    """Relative error; the exact path is x(sigma) = x(sigma_max)·√((s² + sigma²) / (s² + sigma_max²))."""
    with jax.enable_x64(True):
        noise = jnp.asarray(unit_noise(), "float64")
        end = integrate(gaussian, noise, LABELS, sigma_grid(num_steps), SamplerOptions(solver=solver))
        exact = 80 * noise * DATA_STD / np.sqrt(DATA_STD**2 + 80**2)
        return float(jnp.linalg.norm(end - exact) / jnp.linalg.norm(exact))


@pytest.mark.parametrize(("solver", "falls"), [("heun", 4), ("euler", 2), ("dpmpp_2m", 4)])
def test_error_falls_with_the_order_of_the_solver_when_steps_double(solver, falls):
    coarse, fine = (_error_on_gaussian_data(solver, num_steps) for num_steps in (72, 144))
    assert coarse / fine == pytest.approx(falls, rel=0.1)


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
    ((_, rows),) = SOLVERS["ddim"].plan(sigma_grid(9), SamplerOptions(eta=eta))
    variance = (rows.weights[:, 0] * rows.sigmas[:, 0]) ** 2 + rows.after**2
    np.testing.assert_allclose(variance, sigma_grid(9)[1:] ** 2, rtol=1e-12)
    assert (rows.after[:-1] > 0).all()
    assert rows.after[-1] == 0


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
        ({"grid": "cosine"}, None, ["sampling.grid='cosine'", "edm, timesteps, vp, ve, iddpm"]),
        ({"grid": "iddpm", "sigma_min": 70.0}, None, ["sampling.sigma_min=70.0", "do not fall"]),
        ({"grid": "iddpm", "num_steps": 2000}, None, ["2000 noise levels", "do not fall"]),
        ({"alpha": 1.5}, None, ["sampling.alpha=1.5", "at most 1"]),
        ({"alpha": 0.5, "solver": "euler"}, None, ["sampling.alpha=0.5", "'euler'", "for heun; use 1.0"]),
        ({"schedule": "vp", "solver": "dpmpp_2m"}, None, ["sampling.schedule='vp'", "for heun or euler"]),
        ({"scaling": "vp", "solver": "ddim"}, None, ["sampling.scaling='vp'", "for heun or euler"]),
        (
            {"schedule": "vp", "sigma_min": 1e-30},
            None,
            ["sampling.schedule='vp'", "sigma_min=1e-30", "linear"],
        ),
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
