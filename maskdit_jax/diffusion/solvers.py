"""From noise to data: sigma grid, Euler and Heun solvers, optional churn (EDM, alg. 1 and 2)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from maskdit_jax.diffusion.edm import Denoiser
from maskdit_jax.diffusion.guidance import guide
from maskdit_jax.errors import UserError

SOLVERS = ("heun", "euler")
MAX_STEPS = 10_000


def sigma_grid(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> np.ndarray:
    """Noise levels [num_steps + 1] from sigma_max down to sigma_min, then 0; float64 (EDM, eq. 5)."""
    ramp = np.arange(num_steps) / max(num_steps - 1, 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + ramp * (low - high)) ** rho, 0.0)


def count_denoiser_calls(num_steps: int, solver: str) -> int:
    """Denoiser calls per image: 2·num_steps - 1 for Heun, num_steps for Euler."""
    return 2 * num_steps - 1 if solver == "heun" else num_steps


def integrate(
    denoise: Denoiser,
    noise: jax.Array,
    labels: jax.Array,
    sigmas: np.ndarray,
    *,
    solver: str = "heun",
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    churn_noise: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Solve the probability-flow ODE along `sigmas` [num_steps + 1], ending in 0.

    noise [B, H, W, C] is unit normal; the state keeps its dtype. With S_churn > 0 (EDM, alg. 2)
    `churn_noise(step)` gives the unit noise [B, H, W, C] added before step `step`.
    """
    num_steps, dtype = len(sigmas) - 1, noise.dtype
    churned = (S_min <= sigmas[:-1]) & (sigmas[:-1] <= S_max)
    # At most √2 - 1: churning never more than doubles the variance of the noise (EDM, alg. 2).
    gamma = np.where(churned, min(S_churn / num_steps, math.sqrt(2) - 1), 0.0)
    raised = sigmas[:-1] * (1 + gamma)
    added = S_noise * np.sqrt(raised**2 - sigmas[:-1] ** 2)

    def slope(x, sigma):
        return (x - denoise(x, jnp.full(x.shape[0], sigma, dtype), labels)) / sigma

    def euler(x, sigma, sigma_next, added, step):
        if S_churn > 0:
            x = x + added * churn_noise(step).astype(dtype)
        d = slope(x, sigma)
        return x + (sigma_next - sigma) * d, x, d

    def step_forward(x, step_inputs):
        sigma, sigma_next = step_inputs[:2]
        x_next, x, d = euler(x, *step_inputs)
        if solver == "heun":
            d_next = slope(x_next, sigma_next)
            x_next = x + (sigma_next - sigma) * (d + d_next) / 2
        return x_next, None

    # The last step goes to sigma = 0, where the slope is not defined: an Euler step in either solver.
    table = [jnp.asarray(a, dtype) for a in (raised, sigmas[1:], added)] + [jnp.arange(num_steps)]
    x, _ = jax.lax.scan(step_forward, noise * sigmas[0], [a[:-1] for a in table])
    return euler(x, *(a[-1] for a in table))[0]


@dataclass(frozen=True)
class SamplerOptions:
    """How to sample; hashable, so that each choice is one compiled program.

    cfg_scale: guidance, 1 = none; guidance_interval: (low, high) in sigma where it acts, None =
    everywhere; the others as in `sigma_grid` and `integrate`.
    """

    num_steps: int = 40
    solver: str = "heun"
    cfg_scale: float = 1.5
    guidance_interval: tuple[float, float] | None = None
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = 1e9
    S_noise: float = 1.0

    def check(self, prefix: str = "", levels=None) -> None:
        """Refuse what no sampler can work with; `prefix` goes before the names in messages.

        Raises:
          UserError: a value that is not known, out of range or not finite, or noise levels that are so.
        """

        def refuse(name: str, expected: str) -> NoReturn:
            raise UserError(f"{prefix}{name}={getattr(self, name)!r}: expected {expected}")

        if self.solver not in SOLVERS:
            refuse("solver", f"one of {', '.join(SOLVERS)}")
        if not (_is_number(self.num_steps, Integral) and 1 <= self.num_steps <= MAX_STEPS):
            refuse("num_steps", f"a whole number from 1 to {MAX_STEPS:,}")
        for name in ("sigma_min", "sigma_max", "rho"):
            if not (_is_number(value := getattr(self, name)) and 0 < value < math.inf):
                refuse(name, "a number greater than 0")
        for name in ("cfg_scale", "S_churn", "S_min", "S_max", "S_noise"):
            finite = name == "S_max" or getattr(self, name) != math.inf
            if not (_is_number(value := getattr(self, name)) and value >= 0 and finite):
                refuse(name, "a number of at least 0")
        match self.guidance_interval:
            case None:
                pass
            case (low, high) if _is_number(low) and _is_number(high) and low < high:
                pass
            case _:
                refuse("guidance_interval", "(low, high) with low < high")
        self._check_levels(prefix)

    def _check_levels(self, prefix: str) -> None:
        """In float32, in which samples are computed, each noise level must be below the one before."""
        try:
            with np.errstate(all="ignore"):
                grid = sigma_grid(self.num_steps, self.sigma_min, self.sigma_max, self.rho)
                falling = bool((np.diff(grid.astype(np.float32)) < 0).all())
        except ArithmeticError:
            falling = False
        if not falling:
            raise UserError(
                f"{prefix}sigma_min={self.sigma_min}, {prefix}sigma_max={self.sigma_max}, "
                f"{prefix}rho={self.rho}: the {self.num_steps} noise levels that they make do not fall from "
                "each to the next; EDM's are 0.002, 80 and 7"
            )


def _is_number(value: object, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def generate(
    denoise: Denoiser,
    seeds: jax.Array,
    labels: jax.Array,
    image_shape: tuple[int, int, int],
    options: SamplerOptions,
    noise: jax.Array | None = None,
    levels=None,
) -> jax.Array:
    """Samples [B, H, W, C] float32 for seeds [B] and labels [B]; each draw is from the image's own seed.

    noise [B, H, W, C], unit normal, takes the place of the first draw.
    """

    def draw(step):
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)
        return jax.vmap(lambda key: jax.random.normal(key, image_shape))(keys)

    return integrate(
        guide(denoise, options.cfg_scale, options.guidance_interval),
        draw(0) if noise is None else noise,
        labels,
        sigma_grid(options.num_steps, options.sigma_min, options.sigma_max, options.rho),
        solver=options.solver,
        S_churn=options.S_churn,
        S_min=options.S_min,
        S_max=options.S_max,
        S_noise=options.S_noise,
        churn_noise=lambda step: draw(1 + step),
    )
