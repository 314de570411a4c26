"""The average of the weights, and the rules by which it follows them."""

from typing import Any

import jax

Params = dict[str, Any]


def ema_decay_at(rule: str, decay: float, update: jax.Array) -> Any:
    return decay


def update_ema(ema_params: Params, params: Params, decay: Any) -> Params:
    """decay·ema + (1 - decay)·params, in float32."""
    # Not decay·e + (1 - decay)·p: what does not change stays the same to the last bit this way.
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema_params, params)
