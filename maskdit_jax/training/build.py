"""From a resolved configuration to what needs no data: network, mesh, state, jitted step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maskdit_jax.config import ConfigDict, network_options
from maskdit_jax.distributed.mesh import batch_sharding, make_mesh, place_shapes, whole_sharding
from maskdit_jax.training.optimizer import keep_schedule, learning_rate_schedule, make_optimizer
from maskdit_jax.training.state import (
    TrainState,
    init_params,
    init_state,
    network_graph,
)
from maskdit_jax.training.step import StepOptions, make_train_step


class Training(NamedTuple):
    """What `build` makes.

    state_shapes: the state as ShapeDtypeStructs with their shardings. start(params): the sharded
    state before the first update; without parameters they are freshly initialised. step(state,
    batch, num_keep) → state, metrics: one jitted update, which consumes the state. num_keep(step):
    visible tokens, one of keep_levels.
    """

    mesh: Mesh
    state_shapes: TrainState
    start: Callable[[dict[str, Any] | None], TrainState]
    step: jax.stages.Wrapped
    num_keep: Callable[[int], int]
    keep_levels: list[int]


def build(config: ConfigDict) -> Training:
    """Parts of the run that `config`, resolved, describes; nothing is allocated or compiled yet."""
    model, diffusion, training = config.model, config.diffusion, config.training
    num_tokens = (model.image_size // model.patch_size) ** 2
    options = StepOptions(
        seed=config.seed,
        patch_size=model.patch_size,
        num_tokens=num_tokens,
        sigma_data=diffusion.sigma_data,
        P_mean=diffusion.P_mean,
        P_std=diffusion.P_std,
        mae_coef=diffusion.mae_coef,
        label_dropout=diffusion.label_dropout,
        latent_scale=config.data.latent_scale,
        accumulate=training.accumulate,
        ema_decay=training.ema_decay,
    )
    adamw = config.optimizer.to_dict()
    learning_rate = learning_rate_schedule(
        adamw.pop("learning_rate"), adamw.pop("warmup_kimg"), training.batch_size
    )
    optimizer = make_optimizer(learning_rate, **adamw)
    num_keep, keep_levels = keep_schedule(
        num_tokens,
        training.num_steps,
        diffusion.mask_schedule,
        diffusion.mask_ratio,
        diffusion.mask_ratio_min,
        diffusion.mask_schedule_steps,
    )

    graphdef = network_graph(network_options(config))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)

    def start(params=None) -> TrainState:
        if params is None:
            params = init_params(network_options(config), config.seed)
        return init_state(params, optimizer)

    state_shapes = place_shapes(jax.eval_shape(start), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state_shapes)
    step = jax.jit(
        make_train_step(graphdef, optimizer, options, mesh),
        static_argnums=2,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, whole_sharding(mesh)),
    )
    return Training(
        mesh=mesh,
        state_shapes=state_shapes,
        start=jax.jit(start, out_shardings=shardings),
        step=step,
        num_keep=num_keep,
        keep_levels=keep_levels,
    )


def batch_shapes(config: ConfigDict, mesh: Mesh, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of latents for the model of `config`."""
    model, sharding = config.model, batch_sharding(mesh)
    latents = (batch_size, model.image_size, model.image_size, model.channels)
    return {
        "clean": jax.ShapeDtypeStruct(latents, jnp.float32, sharding=sharding),
        "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=sharding),
    }
