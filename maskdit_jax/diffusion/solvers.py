"""From noise to data: grids of noise levels, and the solvers that step along them.

A solver is a step function; SOLVERS is the only list of them. All work on x = clean + sigma·noise, whatever
the network was trained on (EDM, arXiv 2206.00364; DDIM, arXiv 2010.02502, whose x is ours / √(1 + sigma²)).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdit_jax.diffusion.edm import Denoiser
from maskdit_jax.diffusion.guidance import guide
from maskdit_jax.errors import UserError
from maskdit_jax.options import check_options, option

MAX_STEPS = 10_000
GRIDS = ("edm", "timesteps")


def sigma_grid(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> np.ndarray:
    """Noise levels [num_steps + 1] from sigma_max down to sigma_min, then 0; float64 (EDM, eq. 5)."""
    ramp = np.arange(num_steps) / max(num_steps - 1, 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + ramp * (low - high)) ** rho, 0.0)


def timestep_grid(num_steps: int, levels: np.ndarray) -> np.ndarray:
    """Noise levels [num_steps + 1] of timesteps -1 + ⌊T·i / num_steps⌋, from T - 1 down to -1, which is 0.

    levels [T]: the noise level of each timestep.
    """
    times = len(levels) * np.arange(num_steps, -1, -1) // num_steps - 1
    return np.append(0.0, levels)[times + 1]


class Levels(NamedTuple):
    """What a step goes by: it solves from `sigma` to `sigma_next` and adds unit noise times `added`.

    Scalars in a step, [num_steps] float64 in the table of all steps; `added` is None where none adds any.
    """

    sigma: Any
    sigma_next: Any
    added: Any


class Estimate(NamedTuple):
    """Of the clean data, [B, H, W, C] each: as the denoiser gives it, and clipped to -1 … 1 if asked."""

    denoised: jax.Array
    clipped: jax.Array


# (estimate(x, sigma), x, levels, unit noise or None where none is added, carry) → (x at sigma_next, carry)
Step = Callable[
    [Callable[[jax.Array, jax.Array], Estimate], jax.Array, Levels, jax.Array | None, Any],
    tuple[jax.Array, Any],
]


def churned_levels(sigmas: np.ndarray, options: "SamplerOptions") -> Levels:
    """Noise is added before a step, which so starts from a higher level (EDM, alg. 2)."""
    churned = (options.S_min <= sigmas[:-1]) & (sigmas[:-1] <= options.S_max)
    # At most √2 - 1: churning never more than doubles the variance of the noise (EDM, alg. 2).
    gamma = np.where(churned, min(options.S_churn / (len(sigmas) - 1), math.sqrt(2) - 1), 0.0)
    raised = sigmas[:-1] * (1 + gamma)
    added = options.S_noise * np.sqrt(raised**2 - sigmas[:-1] ** 2)
    return Levels(raised, sigmas[1:], added if options.S_churn > 0 else None)


def stochastic_levels(sigmas: np.ndarray, eta: float) -> Levels:
    """Noise is added after a step, which so ends at a lower level (DDIM, eq. 16, in our coordinates).

    sigma_up² = eta²·sigma_next²·(sigma² - sigma_next²) / sigma², sigma_down² = sigma_next² - sigma_up².
    """
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    share = (sigma_next / sigma) ** 2
    sigma_up = eta * sigma_next * np.sqrt(1 - share)
    sigma_down = sigma_next * np.sqrt(1 - eta**2 + eta**2 * share)
    return Levels(sigma, sigma_down, sigma_up if eta > 0 else None)


def _churn(x, levels, noise):
    return x if noise is None else x + levels.added * noise


def _slope(estimate, x, sigma):
    return (x - estimate(x, sigma).clipped) / sigma


def euler_step(estimate, x, levels, noise, carry):
    """Along the slope at the start of the step (EDM, alg. 1 and 2, without the correction)."""
    x = _churn(x, levels, noise)
    return x + (levels.sigma_next - levels.sigma) * _slope(estimate, x, levels.sigma), carry


def heun_step(estimate, x, levels, noise, carry):
    """Along the mean of the slopes at both ends (EDM, alg. 1 and 2)."""
    x = _churn(x, levels, noise)
    d = _slope(estimate, x, levels.sigma)
    x_next = x + (levels.sigma_next - levels.sigma) * d
    d_next = _slope(estimate, x_next, levels.sigma_next)
    return x + (levels.sigma_next - levels.sigma) * (d + d_next) / 2, carry


def ddim_step(estimate, x, levels, noise, carry):
    """From the clipped estimate along the network's own direction (DDIM, eq. 12; MaskDM).

    The direction is not made to agree with the clipped estimate.
    """
    denoised, clipped = estimate(x, levels.sigma)
    x_next = clipped + levels.sigma_next * (x - denoised) / levels.sigma
    return x_next if noise is None else x_next + levels.added * noise, carry


def ancestral_step(estimate, x, levels, noise, carry):
    """A draw from q(x_next | x, clipped estimate) (DDPM, arXiv 2006.11239, eq. 6 and 7)."""
    clipped = estimate(x, levels.sigma).clipped
    x_next = clipped + levels.sigma_next * (x - clipped) / levels.sigma
    return x_next if noise is None else x_next + levels.added * noise, carry


def estimate_step(estimate, x, levels, noise, carry):
    """To sigma 0: the estimate itself."""
    return estimate(x, levels.sigma).clipped, carry


class Solver(NamedTuple):
    """How to step along noise levels.

    levels: (sigmas [num_steps + 1], options) → the table of the steps. step: all steps but the last;
    last: that to sigma 0, where the slope is not defined: one call of the denoiser. calls: those of
    `step`. start: of the noisy x [B, H, W, C] the first step's carry, what a step hands to the next
    besides x, with fixed shapes. churns: knows S_churn.
    """

    levels: Callable[[np.ndarray, "SamplerOptions"], Levels]
    step: Step
    last: Step
    calls: int = 1
    start: Callable[[jax.Array], Any] = lambda x: ()
    churns: bool = False


SOLVERS = {
    "heun": Solver(churned_levels, heun_step, last=euler_step, calls=2, churns=True),
    "euler": Solver(churned_levels, euler_step, last=euler_step, churns=True),
    "ddim": Solver(lambda sigmas, o: stochastic_levels(sigmas, o.eta), ddim_step, last=estimate_step),
    "ancestral": Solver(lambda sigmas, o: stochastic_levels(sigmas, 1.0), ancestral_step, last=estimate_step),
}


def count_denoiser_calls(num_steps: int, solver: str) -> int:
    """Denoiser calls per image: 2·num_steps - 1 for Heun, num_steps for the others."""
    return SOLVERS[solver].calls * (num_steps - 1) + 1


@dataclass(frozen=True)
class SamplerOptions:
    """How to sample; hashable, so that each choice is one compiled program.

    guidance_interval: (low, high) in sigma where guidance acts, None = everywhere.
    """

    num_steps: int = option(40, "steps, each to the next lower noise level", at_least=1, at_most=MAX_STEPS)
    solver: str = option("heun", ", ".join(SOLVERS), choices=tuple(SOLVERS))
    grid: str = option(
        "edm", "noise levels: edm (the three below) or timesteps (the method's own)", choices=GRIDS
    )
    sigma_min: float = option(0.002, "lowest noise level but 0 of grid edm", above=0)
    sigma_max: float = option(80.0, "highest noise level of grid edm", above=0)
    rho: float = option(7.0, "the larger, the more of grid edm's levels are low", above=0)
    cfg_scale: float = option(1.5, "guidance; 1: none", at_least=0)
    guidance_interval: tuple[float, float] | None = None
    clip: bool = option(False, "limit estimates of the clean data to -1 … 1")
    eta: float = option(0.0, "noise of ddim: 0 none … 1 as much as ancestral", at_least=0, at_most=1)
    S_churn: float = option(0.0, "noise of heun and euler (EDM, alg. 2); 0: none", at_least=0)
    S_min: float = option(0.0, "lowest noise level that is churned", at_least=0)
    S_max: float = option(1e9, "highest noise level that is churned", at_least=0)
    S_noise: float = option(1.0, "standard deviation of churning's noise", at_least=0)

    def check(self, prefix: str = "", levels: np.ndarray | None = None) -> None:
        """Refuse what no sampler can work with; `prefix` goes before the names in messages.

        levels [T]: the noise levels of the method's timesteps, None where it has none.

        Raises:
          UserError: a value that is not known, out of range or not finite, or noise levels that are so.
        """
        check_options(self, prefix)
        match self.guidance_interval:
            case None:
                pass
            case (low, high) if _is_number(low) and _is_number(high) and low < high:
                pass
            case interval:
                raise UserError(
                    f"{prefix}guidance_interval={interval!r}: expected (low, high) with low < high"
                )
        if self.S_churn and not SOLVERS[self.solver].churns:
            churning = " or ".join(name for name, solver in SOLVERS.items() if solver.churns)
            raise UserError(
                f"{prefix}S_churn={self.S_churn} is not for {prefix}solver={self.solver!r}, "
                f"but for {churning}; use 0"
            )
        self._check_levels(prefix, levels)

    def _check_levels(self, prefix: str, levels: np.ndarray | None) -> None:
        """In float32, in which samples are computed, each noise level must be below the one before."""
        if self.grid == "timesteps":
            if levels is None:
                raise UserError(
                    f"{prefix}grid='timesteps': the method is not trained on timesteps; use {prefix}grid=edm"
                )
            if self.num_steps > len(levels):
                raise UserError(
                    f"{prefix}num_steps={self.num_steps} must be at most {len(levels):,}, the timesteps that "
                    f"the method has; or use {prefix}grid=edm"
                )
        try:
            with np.errstate(all="ignore"):
                falling = bool((np.diff(noise_grid(self, levels).astype(np.float32)) < 0).all())
        except ArithmeticError:
            falling = False
        if not falling:
            raise UserError(
                f"{prefix}sigma_min={self.sigma_min}, {prefix}sigma_max={self.sigma_max}, "
                f"{prefix}rho={self.rho}: the {self.num_steps} noise levels that they make do not fall from "
                "each to the next; EDM's are 0.002, 80 and 7"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def noise_grid(options: SamplerOptions, levels: np.ndarray | None = None) -> np.ndarray:
    """Noise levels [num_steps + 1] of checked options; levels [T]: those of the method's timesteps."""
    if options.grid == "timesteps":
        assert levels is not None  # `check` has refused it
        return timestep_grid(options.num_steps, levels)
    return sigma_grid(options.num_steps, options.sigma_min, options.sigma_max, options.rho)


def integrate(
    denoise: Denoiser,
    noise: jax.Array,
    labels: jax.Array,
    sigmas: np.ndarray,
    options: SamplerOptions,
    step_noise: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Go along `sigmas` [num_steps + 1], which end in 0, as the options of solver, noise and clipping say.

    noise [B, H, W, C] is unit normal; the state keeps its dtype. `step_noise(step)` gives the unit noise
    [B, H, W, C] that step `step` adds; deterministic solvers need none.
    """
    solver, dtype = SOLVERS[options.solver], noise.dtype

    def estimate(x, sigma):
        denoised = denoise(x, jnp.full(x.shape[0], sigma, dtype), labels)
        return Estimate(denoised, jnp.clip(denoised, -1, 1) if options.clip else denoised)

    def advance(step, state, levels, index):
        x, carry = state
        added_noise = None if levels.added is None else step_noise(index).astype(dtype)
        return step(estimate, x, levels, added_noise, carry)

    levels = jax.tree.map(lambda column: jnp.asarray(column, dtype), solver.levels(sigmas, options))
    table = levels, jnp.arange(len(sigmas) - 1)
    x = noise * sigmas[0]
    state, _ = jax.lax.scan(
        lambda state, row: (advance(solver.step, state, *row), None),
        (x, solver.start(x)),
        jax.tree.map(lambda column: column[:-1], table),
    )
    return advance(solver.last, state, *jax.tree.map(lambda column: column[-1], table))[0]


def generate(
    denoise: Denoiser,
    seeds: jax.Array,
    labels: jax.Array,
    image_shape: tuple[int, int, int],
    options: SamplerOptions,
    noise: jax.Array | None = None,
    levels: np.ndarray | None = None,
) -> jax.Array:
    """Samples [B, H, W, C] float32 for seeds [B] and labels [B]; each draw is from the image's own seed.

    noise [B, H, W, C], unit normal, takes the place of the first draw; levels [T]: the noise levels of
    the method's timesteps.
    """

    def draw(step):
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)
        return jax.vmap(lambda key: jax.random.normal(key, image_shape))(keys)

    return integrate(
        guide(denoise, options.cfg_scale, options.guidance_interval),
        draw(0) if noise is None else noise,
        labels,
        noise_grid(options, levels),
        options,
        step_noise=lambda step: draw(1 + step),
    )
