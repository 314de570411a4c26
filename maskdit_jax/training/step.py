"""One training step: a pure function of the state and a batch, the same for every method."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from maskdit_jax.data.codec import Codec
from maskdit_jax.distributed.mesh import mean_over_devices
from maskdit_jax.methods.method import Draws, Method
from maskdit_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
Gradient = Callable[[Any, Draws], tuple[Any, Metrics]]
# (average, parameters, number of the update from 1) → average
EmaRule = Callable[[Any, Any, jax.Array], Any]


def make_train_step(
    method: Method,
    graphdef: nnx.GraphDef,
    codec: Codec,
    optimizer: optax.GradientTransformation,
    ema_rules: Mapping[str, EmaRule],
    mesh: Mesh,
    *,
    seed: int,
    accumulate: int,
) -> Callable[[TrainState, dict[str, jax.Array], int], tuple[TrainState, Metrics]]:
    """train_step(state, batch, num_keep) → state, metrics; num_keep is static, each value a program.

    batch: `labels` [B] int, and `clean` [B, H, W, C] or `moments` [B, H, W, 2C]. Every random number is
    a function of (seed, step, place in the batch), so neither the mesh nor a restart changes a run.
    A step whose loss or gradient is not finite leaves parameters, EMA and optimizer as they were:
    both are sums over all devices, so all of them skip it or none.
    """

    def batch_loss(params, draws: Draws) -> tuple[jax.Array, Metrics]:
        loss, terms = method.loss(nnx.merge(graphdef, params), draws)
        return loss.mean(), {"loss": loss.mean()} | {name: x.mean() for name, x in terms.items()}

    gradient = mean_over_devices(accumulated(jax.grad(batch_loss, has_aux=True), accumulate), mesh)

    def train_step(
        state: TrainState, batch: dict[str, jax.Array], num_keep: int
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        # Split also where nothing is drawn from a posterior: the other draws of a run do not depend on
        # whether its latents were cached as moments.
        codec_key, draw_key = jax.random.split(key)
        draws = method.draw(draw_key, codec.clean(batch, codec_key), num_keep)
        grads, metrics = gradient(state.params, draws)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        state = update(state, grads, finite, optimizer, ema_rules)
        counters = {name: getattr(state, name) for name in ("nonfinite_in_row", "nonfinite_total")}
        return state, metrics | {"grad_norm": grad_norm} | counters

    return train_step


def update(
    state: TrainState,
    grads: Any,
    finite: jax.Array,
    optimizer: optax.GradientTransformation,
    ema_rules: Mapping[str, EmaRule],
) -> TrainState:
    """The state after one update; where it was not `finite`, only its counters move."""

    def advanced(state: TrainState) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = {name: rule(state.ema[name], params, state.step + 1) for name, rule in ema_rules.items()}
        return state._replace(params=params, ema=ema, opt_state=opt_state)

    def branch(state: TrainState) -> TrainState:
        return jax.lax.cond(finite, advanced, lambda state: state, state)

    def choice(state: TrainState) -> TrainState:
        return jax.tree.map(functools.partial(jnp.where, finite), advanced(state), state)

    # XLA copies the state before it is updated, on a CPU for a choice and on a GPU for a branch.
    state = jax.lax.platform_dependent(state, cpu=branch, default=choice)
    skipped = 1 - finite.astype(jnp.int32)
    return state._replace(
        step=state.step + 1,
        nonfinite_in_row=(state.nonfinite_in_row + 1) * skipped,
        nonfinite_total=state.nonfinite_total + skipped,
    )


def accumulated(gradient: Gradient, microbatches: int) -> Gradient:
    """`gradient` of a batch, as the mean over so many microbatches of it, one after the other."""
    if microbatches == 1:
        return gradient

    def cut(x):  # [B] → [microbatches, B / microbatches]
        return x.reshape(microbatches, -1, *x.shape[1:])

    def mean_gradient(params: Any, draws: Draws) -> tuple[Any, Metrics]:
        def add_microbatch(total, microbatch):
            return jax.tree.map(jnp.add, total, gradient(params, microbatch)), None

        parts = jax.tree.map(cut, draws)
        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add_microbatch, zeros, parts)
        return jax.tree.map(lambda x: x / microbatches, total)

    return mean_gradient
