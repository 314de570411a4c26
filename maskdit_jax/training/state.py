"""The training state, and how it is created and updated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from maskdit_jax.models.maskdit import MaskDiT

Params = dict[str, Any]


class TrainState(NamedTuple):
    """Everything a step changes. Parameters are nested dicts; those of a run of blocks are stacked.

    step: updates tried, and so batches consumed; nonfinite_in_row, nonfinite_total: updates skipped
    because the loss or the gradient was not finite. All int32 scalars.
    """

    step: jax.Array
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    nonfinite_in_row: jax.Array
    nonfinite_total: jax.Array


def network_graph(options: dict[str, Any]) -> nnx.GraphDef:
    """The static half of a `MaskDiT` built with `options`: merged with parameters it is the network."""
    return nnx.split(nnx.eval_shape(lambda: MaskDiT(**options, rngs=nnx.Rngs(0))))[0]


def init_params(options: dict[str, Any], seed: int | jax.Array) -> Params:
    """Fresh parameters of a `MaskDiT` built with `options`."""
    model = MaskDiT(**options, rngs=nnx.Rngs(seed))
    return nnx.to_pure_dict(nnx.split(model)[1])


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update; the EMA starts from the parameters."""
    zero = jnp.zeros((), jnp.int32)
    # A copy: a donated state must not hold one buffer twice.
    ema_params = jax.tree.map(jnp.copy, params)
    return TrainState(zero, params, ema_params, optimizer.init(params), zero + 0, zero + 0)


def update_ema(ema_params: Params, params: Params, decay: float) -> Params:
    """decay·ema + (1 - decay)·params, in float32."""
    # Not decay·e + (1 - decay)·p: what does not change stays the same to the last bit this way.
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema_params, params)
