"""From noise to data: the solvers, in one dict over one driver, and the options of sampling.

All work on x = clean + sigma·noise, whatever the network was trained on (EDM, arXiv 2206.00364; DDIM, arXiv
2010.02502, whose x is ours / √(1 + sigma²)).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdit_jax.diffusion.edm import Denoiser
from maskdit_jax.diffusion.grids import (
    SCALINGS,
    SCHEDULES,
    Path,
    iddpm_grid,
    respaced_grid,
    sigma_grid,
    stride_of,
    strided_grid,
    timestep_grid,
    ve_grid,
    vp_grid,
)
from maskdit_jax.diffusion.guidance import Growth, guide, is_guided, network_sides, null_label_sides
from maskdit_jax.diffusion.steps import (
    Churn,
    Estimate,
    Plan,
    Steps,
    ddim_step,
    plan_ancestral,
    plan_euler,
    plan_heun,
    plan_multistep,
    plan_stochastic,
)
from maskdit_jax.errors import UserError
from maskdit_jax.options import check_options, option

MAX_STEPS = 10_000
GRIDS: dict[str, Callable[["SamplerOptions", Any], np.ndarray]] = {
    "edm": lambda o, _: sigma_grid(o.num_steps, o.sigma_min, o.sigma_max, o.rho),
    "timesteps": lambda o, levels: timestep_grid(o.num_steps, levels),
    "vp": lambda o, _: vp_grid(o.num_steps, o.sigma_min, o.sigma_max),
    "ve": lambda o, _: ve_grid(o.num_steps, o.sigma_min, o.sigma_max),
    "iddpm": lambda o, _: iddpm_grid(o.num_steps, o.sigma_min, o.sigma_max),
    "respaced": lambda o, levels: respaced_grid(o.num_steps, levels),
    "strided": lambda o, levels: strided_grid(o.num_steps, levels),
}
OF_TIMESTEPS = ("timesteps", "respaced", "strided")  # the grids of the method's own noise levels


class Solver(NamedTuple):
    """How to step along noise levels.

    plan: (sigmas [num_steps + 1], options) → all steps. start: of the noisy x [B, H, W, C] the first
    step's carry, what a step hands to the next besides x, with fixed shapes. own: the options that other
    solvers have no use for, and must be at their defaults.
    """

    plan: Callable[[np.ndarray, "SamplerOptions"], Plan]
    start: Callable[[jax.Array], Any] = lambda x: ()
    own: tuple[str, ...] = ()


SOLVERS = {
    "heun": Solver(
        lambda sigmas, o: plan_heun(sigmas, o.path(), o.churn(), o.alpha),
        own=("S_churn", "schedule", "scaling", "alpha"),
    ),
    "euler": Solver(
        lambda sigmas, o: plan_euler(sigmas, o.path(), o.churn()), own=("S_churn", "schedule", "scaling")
    ),
    "dpmpp_2m": Solver(lambda sigmas, o: plan_multistep(sigmas), start=jnp.zeros_like),
    "ddim": Solver(lambda sigmas, o: plan_stochastic(ddim_step, sigmas, o.eta)),
    "ancestral": Solver(lambda sigmas, o: plan_ancestral(sigmas)),
}


@dataclass(frozen=True)
class SamplerOptions:
    """How to sample; hashable, so that each choice is one compiled program.

    guidance_interval: (low, high) in sigma where guidance acts, None = everywhere. Grid, schedule, scaling
    and alpha are those of EDM's table 1 and alg. 3.
    """

    num_steps: int = option(40, "steps, each to the next lower noise level", at_least=1, at_most=MAX_STEPS)
    solver: str = option("heun", ", ".join(SOLVERS), choices=tuple(SOLVERS))
    grid: str = option(
        "edm",
        f"noise levels: {', '.join(GRIDS)}; {', '.join(OF_TIMESTEPS)} are the method's own",
        choices=tuple(GRIDS),
    )
    sigma_min: float = option(0.002, "lowest noise level but 0; not of grids of timesteps", above=0)
    sigma_max: float = option(80.0, "highest noise level; not of grids of timesteps", above=0)
    rho: float = option(7.0, "the larger, the more of grid edm's levels are low", above=0)
    schedule: str = option(
        "linear", "noise over time, for heun and euler: linear, vp or ve", choices=tuple(SCHEDULES)
    )
    scaling: str = option(
        "none", "scale of x over time, for heun and euler: none or vp", choices=tuple(SCALINGS)
    )
    alpha: float = option(
        1.0, "where in its step heun looks again: 1 at the end, 0.5 midway", above=0, at_most=1
    )
    cfg_scale: float = option(1.5, "guidance; 1: none", at_least=0)
    guided_channels: int = option(0, "guide only so many of the first channels; 0: all", at_least=0)
    cfg_growth: float = option(
        0.0, "guidance grows while sampling, by this power (MDT: 4); 0: it does not", at_least=0
    )
    guidance_interval: tuple[float, float] | None = None
    clip: bool = option(False, "limit estimates of the clean data to -1 … 1")
    eta: float = option(0.0, "noise of ddim: 0 none … 1 as much as ancestral", at_least=0, at_most=1)
    S_churn: float = option(0.0, "noise of heun and euler (EDM, alg. 2); 0: none", at_least=0)
    S_min: float = option(0.0, "lowest noise level that is churned", at_least=0)
    S_max: float = option(1e9, "highest noise level that is churned", at_least=0)
    S_noise: float = option(1.0, "standard deviation of churning's noise", at_least=0)

    def path(self) -> Path:
        """The way through the noise levels, of heun and euler."""
        return Path(SCHEDULES[self.schedule](self.sigma_min, self.sigma_max), SCALINGS[self.scaling])

    def churn(self) -> Churn:
        """The noise that heun and euler add."""
        return Churn(self.S_churn, self.S_min, self.S_max, self.S_noise)

    def growth(self, levels: np.ndarray | None) -> Growth | None:
        """Of guidance, if it grows; levels [T]: the noise levels of the method's timesteps."""
        return Growth(self.cfg_growth, levels) if self.cfg_growth and levels is not None else None

    def check(self, prefix: str = "", levels: np.ndarray | None = None) -> None:
        """Refuse what no sampler can work with; `prefix` goes before the names in messages.

        levels [T]: the noise levels of the method's timesteps, None where it has none.

        Raises:
          UserError: a value that is not known, out of range or not finite, or noise levels that are so.
        """
        check_options(self, prefix)
        if self.cfg_growth and levels is None:
            raise UserError(
                f"{prefix}cfg_growth={self.cfg_growth}: guidance grows over timesteps, which the method has "
                f"none of; use 0"
            )
        match self.guidance_interval:
            case None:
                pass
            case (low, high) if _is_number(low) and _is_number(high) and low < high:
                pass
            case interval:
                raise UserError(
                    f"{prefix}guidance_interval={interval!r}: expected (low, high) with low < high"
                )
        for field in dataclasses.fields(self):
            knowing = [name for name, solver in SOLVERS.items() if field.name in solver.own]
            value = getattr(self, field.name)
            if knowing and self.solver not in knowing and value != field.default:
                raise UserError(
                    f"{prefix}{field.name}={value!r} is not for {prefix}solver={self.solver!r}, "
                    f"but for {' or '.join(knowing)}; use {field.default!r}"
                )
        self._check_levels(prefix, levels)

    def _check_levels(self, prefix: str, levels: np.ndarray | None) -> None:
        """In float32, in which samples are computed, each noise level must be below the one before."""
        if self.grid in OF_TIMESTEPS:
            if levels is None:
                raise UserError(
                    f"{prefix}grid={self.grid!r}: the method is not trained on timesteps; use "
                    f"{prefix}grid=edm"
                )
            if self.num_steps > len(levels):
                raise UserError(
                    f"{prefix}num_steps={self.num_steps} must be at most {len(levels):,}, the timesteps that "
                    f"the method has; or use {prefix}grid=edm"
                )
            if self.grid == "strided" and not stride_of(self.num_steps, len(levels)):
                raise UserError(
                    f"{prefix}num_steps={self.num_steps}: with no stride are so many of {len(levels):,} "
                    f"timesteps passed; use {prefix}grid=respaced"
                )
        try:
            with np.errstate(all="ignore"):
                sigmas = noise_grid(self, levels)
                falling = bool((np.diff(sigmas.astype(np.float32)) < 0).all())
                plan = SOLVERS[self.solver].plan(sigmas, self)
        except (ArithmeticError, LookupError):
            falling = False
        if not falling:
            raise UserError(
                f"{prefix}sigma_min={self.sigma_min}, {prefix}sigma_max={self.sigma_max}, "
                f"{prefix}rho={self.rho}: the {self.num_steps} noise levels that they make do not fall from "
                "each to the next; EDM's are 0.002, 80 and 7"
            )
        if not all(np.isfinite(steps.rows.weights).all() for steps in plan):
            raise UserError(
                f"{prefix}schedule={self.schedule!r} and {prefix}scaling={self.scaling!r} cannot be computed "
                f"between {prefix}sigma_min={self.sigma_min} and {prefix}sigma_max={self.sigma_max}; use "
                "linear and none"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def noise_grid(options: SamplerOptions, levels: np.ndarray | None = None) -> np.ndarray:
    """Noise levels [num_steps + 1] of checked options; levels [T]: those of the method's timesteps."""
    return GRIDS[options.grid](options, levels)


def count_network_calls(
    options: SamplerOptions, levels: np.ndarray | None = None, guided: bool = True
) -> int:
    """Evaluations of a network per image, of checked options; a guided call is one of each side.

    levels [T]: the noise levels of the method's timesteps; guided: whether there is a side to guide from.
    """
    plan = SOLVERS[options.solver].plan(noise_grid(options, levels), options)
    sigmas = np.concatenate([steps.rows.sigmas.reshape(-1) for steps in plan])
    twice = is_guided(sigmas, options.cfg_scale, options.guidance_interval) if guided else False
    return sigmas.size + int(np.sum(twice))


def integrate(
    denoise: Denoiser,
    noise: jax.Array,
    labels: jax.Array,
    sigmas: np.ndarray,
    options: SamplerOptions,
    step_noise: Callable[[jax.Array], jax.Array] | None = None,
    guided: Denoiser | None = None,
) -> jax.Array:
    """Go along `sigmas` [num_steps + 1], which end in 0, as the options of solver, noise and clipping say.

    noise [B, H, W, C] is unit normal; the state keeps its dtype. `step_noise(step)` gives the unit noise
    [B, H, W, C] that step `step` adds; deterministic solvers need none. `guided` takes the place of
    `denoise` where the options guide: consecutive steps whose calls do so alike are one loop, so that
    nothing is decided, or computed for nothing, while the program runs.
    """
    solver, dtype = SOLVERS[options.solver], noise.dtype

    def advance(state, numbered, step, guided_calls):
        (x, carry), (index, row) = state, numbered

        def estimate(x, call):
            chosen = guided if guided_calls[call] else denoise
            # Else XLA may compute with one noise level for all images, in another order on each mesh.
            sigma = jax.lax.optimization_barrier(jnp.full(x.shape[0], row.sigmas[call], dtype))
            prediction, channels = chosen(x, sigma, labels), x.shape[-1]
            denoised, share = prediction[..., :channels], None
            if prediction.shape[-1] > channels:
                share = prediction[..., channels:]
            return Estimate(denoised, jnp.clip(denoised, -1, 1) if options.clip else denoised, share)

        drawn = None if row.before is None and row.after is None else step_noise(index).astype(dtype)
        x = x if row.before is None else x + row.before * drawn
        return step(estimate, x, row, carry, None if row.after is None else drawn), None

    x, done = noise * sigmas[0], 0
    state = x, solver.start(x)
    for steps, guided_calls in _alike(solver.plan(sigmas, options), options, guided is not None):
        rows = jax.tree.map(lambda column: jnp.asarray(column, dtype), steps.rows)
        end = done + len(rows.sigmas)
        state, _ = jax.lax.scan(
            functools.partial(advance, step=steps.step, guided_calls=guided_calls),
            state,
            (jnp.arange(done, end), rows),
        )
        done = end
    return state[0]


def _alike(plan: Plan, options: SamplerOptions, guided: bool) -> Iterator[tuple[Steps, tuple[bool, ...]]]:
    """The plan, cut where other calls of a step are guided than before; with those of each part that are."""
    for step, rows in plan:
        acts = is_guided(rows.sigmas, options.cfg_scale, options.guidance_interval) & guided
        cuts = 1 + np.flatnonzero((acts[1:] != acts[:-1]).any(axis=1))
        for first, end in itertools.pairwise([0, *cuts, len(acts)]):
            if end > first:
                yield Steps(step, rows.part(slice(first, end))), tuple(acts[first])


def generate(
    denoise: Denoiser,
    seeds: jax.Array,
    labels: jax.Array,
    image_shape: tuple[int, int, int],
    options: SamplerOptions,
    noise: jax.Array | None = None,
    levels: np.ndarray | None = None,
    weak: Denoiser | None = None,
) -> jax.Array:
    """Samples [B, H, W, C] float32 for seeds [B] and labels [B]; each draw is from the image's own seed.

    noise [B, H, W, C], unit normal, takes the place of the first draw; levels [T]: the noise levels of
    the method's timesteps; weak: what guidance leads away from, by default `denoise` without labels.
    """

    def draw(step):
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)
        return jax.vmap(lambda key: jax.random.normal(key, image_shape))(keys)

    sides = null_label_sides(denoise) if weak is None else network_sides(denoise, weak)
    return integrate(
        denoise,
        draw(0) if noise is None else noise,
        labels,
        noise_grid(options, levels),
        options,
        step_noise=lambda step: draw(1 + step),
        guided=guide(sides, options.cfg_scale, options.guided_channels, options.growth(levels)),
    )
