"""The average of the weights, and the rules by which it follows them."""

import jax
import jax.numpy as jnp

from maskdit_jax.methods.method import Params


def ema_decay_at(rule: str, decay: float, update: jax.Array) -> float | jax.Array:
    """What update number `update` (1, 2, …) leaves of the average.

    constant: `decay` from the first. warmup: 0, a copy of the weights, through update 102, then
    min(decay, 1 - (update - 100)^(-2/3)), float32 (MaskDM's training).
    """
    if rule == "constant":
        return decay
    since = jnp.maximum(update - 100, 1).astype(jnp.float32)
    return jnp.where(update <= 102, 0.0, jnp.minimum(decay, 1 - since ** (-2 / 3)))


def update_ema(ema_params: Params, params: Params, decay: float | jax.Array) -> Params:
    """decay·ema + (1 - decay)·params, in float32; with decay 0 the very parameters."""

    def follow(e, p):
        # Not decay·e + (1 - decay)·p: what does not change stays the same to the last bit this way.
        moved = e + (1 - decay) * (p - e)
        return moved if isinstance(decay, float) and decay else jnp.where(decay == 0, p, moved)

    return jax.tree.map(follow, ema_params, params)
