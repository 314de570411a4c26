"""The optimizer, and what changes during training: learning rate and number of visible tokens."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

MAX_PROGRAMS = 16


def make_optimizer(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW, after the gradient's global norm is limited to clip_norm; 0: to infinity.

    Limited in any case, so that the state is the same one whether a run clips or not: see `with_clip`.
    """
    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm or math.inf), adamw)


def without_clip(opt_state: optax.OptState) -> optax.OptState:
    """The optimizer's state as runs that did not clip once saved it: AdamW's alone."""
    _, adamw = opt_state
    return adamw


def with_clip(adamw: optax.OptState) -> optax.OptState:
    """The optimizer's state of today, of AdamW's alone: clipping has none of its own."""
    return optax.EmptyState(), adamw


def learning_rate_schedule(peak: float, warmup_kimg: float, batch_size: int) -> optax.Schedule:
    """Constant after a linear warm-up over `warmup_kimg` thousand items; the first update already moves.

    Of a number on the host it is one on the host: nothing waits for a device.
    """
    # At least one step: without a warm-up the first update has the whole rate.
    warmup_steps = max(warmup_kimg * 1000 / batch_size, 1)
    return lambda count: (
        peak * (jnp if isinstance(count, jax.Array) else np).minimum((count + 1) / warmup_steps, 1.0)
    )


def rounded_schedule(
    exact: Callable[[int], int], low: int, high: int
) -> tuple[Callable[[int], int], list[int]]:
    """A schedule of whole numbers, exact(step) from `low` to `high`, in at most 16 values, and these values.

    Each value is a compiled program; of a schedule with more than 16 of them 16 are used, evenly spread.
    """
    count = min(MAX_PROGRAMS, high - low + 1)
    levels = [round(low + (high - low) * i / max(count - 1, 1)) for i in range(count)]

    def rounded(step: int) -> int:
        value = exact(step)
        return min(levels, key=lambda level: abs(level - value))

    return rounded, levels
