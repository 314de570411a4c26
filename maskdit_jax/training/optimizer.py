"""The optimizer, and what changes during training: learning rate and share of hidden patches."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import optax

from maskdit_jax.models.masking import count_kept

MAX_PROGRAMS = 16
MASK_SCHEDULES = ("constant", "linear", "exp", *(f"cosine{n}" for n in range(2, 7)))


def make_optimizer(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW; with clip_norm > 0 the gradient's global norm is limited first."""
    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw


def learning_rate_schedule(peak: float, warmup_kimg: float, batch_size: int) -> optax.Schedule:
    """Constant after a linear warm-up over `warmup_kimg` thousand items; the first update already moves."""
    # At least one step: without a warm-up the first update has the whole rate.
    warmup_steps = max(warmup_kimg * 1000 / batch_size, 1)
    return lambda count: peak * jnp.minimum((count + 1) / warmup_steps, 1.0)


def mask_ratio_at(progress: float, schedule: str, ratio: float, ratio_min: float) -> float:
    """Mask ratio at progress 0 … 1 (METHOD of MaskDiT's tuning stage, sec. 4).

    `constant` ignores `ratio_min`; `linear` rises from it to `ratio`; the others fall from `ratio`:
    cosineN = (ratio - ratio_min)·cosᴺ(π·progress / 2) + ratio_min, exp = (…)·exp(-7·progress) + ratio_min.
    """
    if schedule == "constant":
        return ratio
    if schedule == "linear":
        shape = progress
    elif schedule == "exp":
        shape = math.exp(-7 * progress)
    else:
        shape = math.cos(math.pi * progress / 2) ** int(schedule.removeprefix("cosine"))
    return (ratio - ratio_min) * shape + ratio_min


def keep_schedule(
    num_tokens: int, num_steps: int, schedule: str, ratio: float, ratio_min: float, horizon: int = 0
) -> tuple[Callable[[int], int], list[int]]:
    """Number of visible tokens at a step of `num_steps`, and the values it can take.

    The schedule runs its course over `horizon` steps, 0: over the run; a shorter run ends within it. Each
    value is a compiled program, so of a schedule with more than 16 of them 16 are used, evenly spread
    between those of the run's first and last step.
    """

    def exact(step: int) -> int:
        progress = min(step / max((horizon or num_steps) - 1, 1), 1.0)
        return count_kept(num_tokens, mask_ratio_at(progress, schedule, ratio, ratio_min))

    low, high = sorted((exact(0), exact(num_steps - 1)))
    count = min(MAX_PROGRAMS, high - low + 1)
    levels = [round(low + (high - low) * i / max(count - 1, 1)) for i in range(count)]
    return lambda step: min(levels, key=lambda level: abs(level - exact(step))), levels
