"""From a resolved configuration to what needs no data: network, mesh, state, jitted step."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from maskdit_jax.config import ConfigDict, compute_of, method_of, shape_of
from maskdit_jax.data.codec import Codec
from maskdit_jax.distributed.mesh import batch_sharding, make_mesh, place_shapes, whole_sharding
from maskdit_jax.methods.method import Params, init_params, network_graph
from maskdit_jax.training.ema import ema_decay_at, update_ema
from maskdit_jax.training.optimizer import learning_rate_schedule, make_optimizer, rounded_schedule
from maskdit_jax.training.state import EMA, TrainState, init_state
from maskdit_jax.training.step import make_train_step


class Training(NamedTuple):
    """What `build` makes.

    state_shapes: the state as ShapeDtypeStructs with their shardings. start(params): the sharded
    state before the first update; without parameters they are freshly initialised. step(state,
    batch, num_keep) → state, metrics: one jitted update, which consumes the state. num_keep(step):
    visible tokens of num_tokens, one of keep_levels. learning_rate(count): after `count` updates.
    """

    mesh: Mesh
    state_shapes: TrainState
    start: Callable[[Params | None], TrainState]
    step: jax.stages.Wrapped
    num_tokens: int
    num_keep: Callable[[int], int]
    keep_levels: list[int]
    learning_rate: optax.Schedule


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Training:
    """Parts of the run that `config`, resolved, describes; nothing is allocated or compiled yet.

    devices: by default all there are; others, of a topology, can be compiled for but not run on.
    """
    method, data, compute = method_of(config), shape_of(config), compute_of(config)
    training, adamw = config.training, config.optimizer.to_dict()
    learning_rate = learning_rate_schedule(
        adamw.pop("learning_rate"), adamw.pop("warmup_kimg"), training.batch_size
    )
    optimizer = make_optimizer(learning_rate, **adamw)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)

    def start(params=None) -> TrainState:
        if params is None:
            params = init_params(method, data, compute, config.seed)
        return init_state(params, optimizer)

    def follow(ema, params, update):
        return update_ema(ema, params, ema_decay_at(config.ema.rule, config.ema.decay, update))

    state_shapes = place_shapes(jax.eval_shape(start), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state_shapes)
    train_step = make_train_step(
        method,
        network_graph(method, data, compute),
        Codec(config.data.space, config.data.latent_scale),
        optimizer,
        {EMA: follow},
        mesh,
        seed=config.seed,
        accumulate=training.accumulate,
    )
    num_keep, keep_levels = rounded_schedule(
        functools.partial(method.num_keep, data, num_steps=training.num_steps),
        *method.num_keep_range(data, training.num_steps),
    )
    return Training(
        mesh=mesh,
        state_shapes=state_shapes,
        start=jax.jit(start, out_shardings=shardings),
        step=jax.jit(
            train_step,
            static_argnums=2,
            donate_argnums=0,
            in_shardings=(shardings, batch_sharding(mesh)),
            out_shardings=(shardings, whole_sharding(mesh)),
        ),
        num_tokens=method.num_tokens(data),
        num_keep=num_keep,
        keep_levels=keep_levels,
        learning_rate=learning_rate,
    )


def batch_shapes(config: ConfigDict, mesh: Mesh, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of clean data for the model of `config`."""
    data, sharding = shape_of(config), batch_sharding(mesh)
    clean = (batch_size, data.image_size, data.image_size, data.channels)
    return {
        "clean": jax.ShapeDtypeStruct(clean, jnp.float32, sharding=sharding),
        "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=sharding),
    }
