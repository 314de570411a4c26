"""Steps from one noise level to the next: their arithmetic, and plans of it for a whole way.

Every step is linear in x = clean + sigma·noise and in what the denoiser makes of it. So a solver is a plan,
tables of numbers made on the host in float64, and a step function that multiplies by them: a division by a
number of the table is another product on another mesh, as XLA sees fit. The schedules and
scalings of EDM's sampler (arXiv 2206.00364) are such numbers and no more: the state of its paths is s(t)·x.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdit_jax.diffusion.grids import Path, Points


class Estimate(NamedTuple):
    """Of the clean data, [B, H, W, C] each: as the denoiser gives it, and clipped to -1 … 1 if asked.

    share: of a step's largest variance in its own, in logarithms; None where it is not learned.
    """

    denoised: jax.Array
    clipped: jax.Array
    share: jax.Array | None


class Rows(NamedTuple):
    """What steps go by, n of them in a plan and one where it is taken: float64 in a plan.

    sigmas [n, calls]: the noise level of each call of the denoiser. weights [n, k]: what the step multiplies
    by. before, after [n]: times this, unit noise is added to x before the step and at its end; None: none is.
    """

    sigmas: Any
    weights: Any
    before: Any = None
    after: Any = None

    def part(self, some: slice) -> "Rows":
        """Those of some steps."""
        return jax.tree.map(lambda column: column[some], self)


# (estimate(x, which call of the step), x, its row, carry, unit noise to be added at its end, if any) → (x at
# the next noise level, carry)
Step = Callable[
    [Callable[[jax.Array, int], Estimate], jax.Array, Rows, Any, jax.Array | None], tuple[jax.Array, Any]
]


class Steps(NamedTuple):
    """Consecutive steps of one kind."""

    step: Step
    rows: Rows


Plan = list[Steps]  # of all steps, in their order


class Churn(NamedTuple):
    """Noise added before steps: S_churn, S_min, S_max and S_noise of EDM, alg. 2."""

    amount: float
    low: float
    high: float
    noise: float


def euler_step(estimate, x, row, carry, noise):
    """Along the slope at the start of the step (EDM, alg. 1 and 2, without the correction)."""
    keep, along = row.weights
    return keep * x + along * (x - estimate(x, 0).clipped), carry


def heun_step(estimate, x, row, carry, noise):
    """Along a mean of two slopes, at the start and at a point along the first (EDM, alg. 1 to 3)."""
    keep_to, along_to, keep, along, along_second = row.weights
    noise = x - estimate(x, 0).clipped
    second = keep_to * x + along_to * noise
    second_noise = second - estimate(second, 1).clipped
    return keep * x + along * noise + along_second * second_noise, carry


def multistep_step(estimate, x, row, last, noise):
    """Towards the line through the last estimate and this one (DPM-Solver++, alg. 2)."""
    keep, new, old = row.weights
    clipped = estimate(x, 0).clipped
    return keep * x + new * clipped + old * last, clipped


def ddim_step(estimate, x, row, carry, noise):
    """From the clipped estimate along the network's own direction (DDIM, eq. 12; MaskDM).

    The direction is not made to agree with the clipped estimate.
    """
    denoised, clipped, _ = estimate(x, 0)
    x = clipped + row.weights[0] * (x - denoised)
    return (x if noise is None else x + row.after * noise), carry


def ancestral_step(estimate, x, row, carry, noise):
    """A draw from q(x_next | x, clipped estimate) (DDPM, arXiv 2006.11239, eq. 6 and 7).

    With a learned variance from p(x_next | x), as wide or wider (arXiv 2102.09672, eq. 15).
    """
    _, clipped, share = estimate(x, 0)
    spread = row.after if share is None else row.after * jnp.exp(share * row.weights[1])
    return clipped + row.weights[0] * (x - clipped) + spread * noise, carry


def plan_euler(sigmas: np.ndarray, path: Path, churn: Churn) -> Plan:
    """Steps along a path through sigmas [num_steps + 1], which end in 0."""
    raised, added = _churned(sigmas, churn)
    keep, along = _moved(path.at(raised), path.at(sigmas[1:]))
    weights = np.stack([keep, along / raised], axis=1)
    return [Steps(euler_step, Rows(raised[:, None], weights, before=added))]


def plan_heun(sigmas: np.ndarray, path: Path, churn: Churn, alpha: float) -> Plan:
    """Steps that look again at `alpha` of their length; the last, to sigma 0, is Euler's.

    Their slope is (1 - 1/(2·alpha))·first + 1/(2·alpha)·second (EDM, alg. 3).
    """
    ((_, euler),) = plan_euler(sigmas, path, churn)
    corrected, last = euler.part(slice(-1)), euler.part(slice(-1, None))
    start, end = path.at(corrected.sigmas[:, 0]), path.at(sigmas[1:-1])
    h = end.time - start.time
    second = path.at_time(start.time + alpha * h)
    keep_to, along_to = _moved(start, second)
    first_h, second_h = h * (1 - 1 / (2 * alpha)), h / (2 * alpha)
    scaled = second_h * second.scale_slope  # of x at the second point, itself made of x and its noise
    keep = start.scale + first_h * start.scale_slope + scaled * keep_to
    along = first_h * start.scale * start.sigma_slope + scaled * along_to
    along_second = second_h * second.scale * second.sigma_slope
    to_end = (keep, along / start.sigma, along_second / second.sigma)
    weights = np.stack([keep_to, along_to / start.sigma, *(w / end.scale for w in to_end)], axis=1)
    looks = np.stack([start.sigma, second.sigma], axis=1)
    corrected = corrected._replace(sigmas=looks, weights=weights)
    return [Steps(heun_step, corrected), Steps(euler_step, last)]


def _churned(sigmas: np.ndarray, churn: Churn) -> tuple[np.ndarray, np.ndarray | None]:
    """Noise is added before a step, which so starts from a higher level (EDM, alg. 2): levels, noise [n]."""
    churns = (churn.low <= sigmas[:-1]) & (sigmas[:-1] <= churn.high)
    # At most √2 - 1: churning never more than doubles the variance of the noise (EDM, alg. 2).
    gamma = np.where(churns, min(churn.amount / (len(sigmas) - 1), math.sqrt(2) - 1), 0.0)
    raised = sigmas[:-1] * (1 + gamma)
    added = churn.noise * np.sqrt(raised**2 - sigmas[:-1] ** 2)
    return raised, added if churn.amount > 0 else None


def _moved(start: Points, end: Points) -> tuple[np.ndarray, np.ndarray]:
    """Weights of x and of the noise in it [n] that make x at the end, along the slope at the start.

    d(s·x)/dt = s'·x + s·sigma'·noise, where noise = (x - D) / sigma (EDM, alg. 1).
    """
    h = end.time - start.time
    keep = (start.scale + h * start.scale_slope) / end.scale
    return keep, h * start.scale * start.sigma_slope / end.scale


def plan_multistep(sigmas: np.ndarray) -> Plan:
    """DPM-Solver++ of order 2 (arXiv 2211.01095, alg. 2) in steps of -ln(sigma).

    x_next = (sigma_next / sigma)·x + (1 - sigma_next / sigma)·D', where
    D' = (1 + 1/(2·r))·D - 1/(2·r)·D_last and r is the last step's length over this one's. D' = D in the first
    step, which has no last estimate, and in the last, which is endless.
    """
    sigma, share = sigmas[:-1], sigmas[1:] / sigmas[:-1]
    length, beyond = -np.log(share[:-1]), np.zeros_like(sigma)
    beyond[1:-1] = length[1:] / length[:-1] / 2
    weights = np.stack([share, (1 - share) * (1 + beyond), -(1 - share) * beyond], axis=1)
    return [Steps(multistep_step, Rows(sigma[:, None], weights))]


def plan_stochastic(step: Step, sigmas: np.ndarray, eta: float) -> Plan:
    """Noise is added after a step, which so ends at a lower level (DDIM, eq. 16, in our coordinates).

    sigma_up² = eta²·sigma_next²·(sigma² - sigma_next²) / sigma², sigma_down² = sigma_next² - sigma_up².
    """
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    share = (sigma_next / sigma) ** 2
    sigma_up = eta * sigma_next * np.sqrt(1 - share)
    sigma_down = sigma_next * np.sqrt(1 - eta**2 + eta**2 * share)
    weights = (sigma_down / sigma)[:, None]
    return [Steps(step, Rows(sigma[:, None], weights, after=sigma_up if eta > 0 else None))]


def plan_ancestral(sigmas: np.ndarray) -> Plan:
    """Steps with as much noise as there may be; learned variances make it up to that of DDPM's betas.

    In our coordinates these add sigma_up² · (1 + 1/sigma_next²) / (1 + 1/sigma²), of which half the logarithm
    is the second weight.
    """
    ((_, rows),) = plan_stochastic(ancestral_step, sigmas, 1.0)
    widening = np.zeros(len(sigmas) - 1)  # nothing in the last step, which adds no noise
    widening[:-1] = 0.5 * np.diff(np.log1p(sigmas[:-1] ** -2.0))
    return [Steps(ancestral_step, rows._replace(weights=np.column_stack([rows.weights, widening])))]
