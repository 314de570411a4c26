"""The training state: everything a step changes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from maskdit_jax.methods.method import Params

EMA = "ema"  # the one track there is


class TrainState(NamedTuple):
    """Everything a step changes. Parameters are nested dicts; those of a run of blocks are stacked.

    step: updates tried, and so batches consumed; ema: averages of the parameters by name, each with a
    rule of its own; nonfinite_in_row, nonfinite_total: updates skipped because the loss or the gradient
    was not finite. The counters are int32 scalars.
    """

    step: jax.Array
    params: Params
    ema: dict[str, Params]
    opt_state: optax.OptState
    nonfinite_in_row: jax.Array
    nonfinite_total: jax.Array


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update; the EMA starts from the parameters."""
    zero = jnp.zeros((), jnp.int32)
    # A copy: a donated state must not hold one buffer twice.
    ema = {EMA: jax.tree.map(jnp.copy, params)}
    return TrainState(zero, params, ema, optimizer.init(params), zero + 0, zero + 0)
