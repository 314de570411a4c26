"""One training step: a pure function of the state and a batch."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from maskdit_jax.data.latents import draw_latents
from maskdit_jax.diffusion.edm import precondition
from maskdit_jax.diffusion.losses import NoisyBatch, draw_noisy_batch, maskdit_loss
from maskdit_jax.distributed.mesh import mean_over_devices
from maskdit_jax.training.state import TrainState, update_ema

Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class StepOptions:
    """The numbers of a step; the names are those of the configuration."""

    seed: int
    patch_size: int
    num_tokens: int
    sigma_data: float
    P_mean: float
    P_std: float
    mae_coef: float
    label_dropout: float
    latent_scale: float
    accumulate: int
    ema_decay: float


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, options: StepOptions, mesh: Mesh
) -> Callable[[TrainState, dict[str, jax.Array], int], tuple[TrainState, Metrics]]:
    """train_step(state, batch, num_keep) → state, metrics; num_keep is static, each value a program.

    batch: `label` [B] int, and `latents` [B, H, W, C] or `moments` [B, H, W, 2C]. Every random number is
    a function of (seed, step, place in the batch), so neither the mesh nor a restart changes a run.
    A step whose loss or gradient is not finite leaves parameters, EMA and optimizer as they were:
    both are sums over all devices, so all of them skip it or none.
    """

    def batch_loss(params, noisy_batch: NoisyBatch):
        denoise = precondition(nnx.merge(graphdef, params), options.sigma_data)
        loss, terms = maskdit_loss(
            denoise,
            noisy_batch,
            patch_size=options.patch_size,
            sigma_data=options.sigma_data,
            mae_coef=options.mae_coef,
        )
        means = {name: term.mean() for name, term in terms.items()}
        return loss.mean(), {"loss": loss.mean(), **means}

    def train_step(
        state: TrainState, batch: dict[str, jax.Array], num_keep: int
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(options.seed), state.step)
        # Split also where the latents are given and nothing is drawn from a posterior: the other draws of
        # a run do not depend on whether its latents were cached as moments.
        posterior_key, draw_key = jax.random.split(key)
        noisy_batch = draw_noisy_batch(
            draw_key,
            _latents(batch, posterior_key, options.latent_scale),
            batch["labels"],
            P_mean=options.P_mean,
            P_std=options.P_std,
            label_dropout=options.label_dropout,
            num_tokens=options.num_tokens,
            num_keep=num_keep,
        )
        grads, metrics = mean_over_devices(
            functools.partial(mean_gradient, batch_loss, accumulate=options.accumulate),
            state.params,
            noisy_batch,
            mesh,
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = update_ema(state.ema_params, params, options.ema_decay)

        def keep_if_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        skipped = 1 - finite.astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=keep_if_finite(params, state.params),
            ema_params=keep_if_finite(ema_params, state.ema_params),
            opt_state=keep_if_finite(opt_state, state.opt_state),
            nonfinite_in_row=(state.nonfinite_in_row + 1) * skipped,
            nonfinite_total=state.nonfinite_total + skipped,
        )
        metrics |= {
            "grad_norm": grad_norm,
            "nonfinite_in_row": new_state.nonfinite_in_row,
            "nonfinite_total": new_state.nonfinite_total,
        }
        return new_state, metrics

    return train_step


def mean_gradient(
    batch_loss: Callable[[Any, NoisyBatch], tuple[jax.Array, Metrics]],
    params: Any,
    noisy_batch: NoisyBatch,
    accumulate: int,
) -> tuple[Any, Metrics]:
    """Gradient and metrics of a batch: the mean over `accumulate` microbatches, one after the other."""
    value_and_grad = jax.value_and_grad(batch_loss, has_aux=True)

    def of_microbatch(microbatch: NoisyBatch) -> tuple[Any, Metrics]:
        (_, metrics), grads = value_and_grad(params, microbatch)
        return grads, metrics

    if accumulate == 1:
        return of_microbatch(noisy_batch)

    def cut(x):  # [B] → [accumulate, B / accumulate]
        return x.reshape(accumulate, -1, *x.shape[1:])

    def add_microbatch(total, microbatch):
        return jax.tree.map(jnp.add, total, of_microbatch(microbatch)), None

    microbatches = jax.tree.map(cut, noisy_batch)
    shapes = jax.eval_shape(of_microbatch, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add_microbatch, zeros, microbatches)
    return jax.tree.map(lambda x: x / accumulate, total)


def _latents(batch: dict[str, jax.Array], key: jax.Array, latent_scale: float) -> jax.Array:
    """Latents [B, H, W, C] of a batch: as they are, or a new draw from the cached moments."""
    if "clean" in batch:
        return batch["clean"]
    moments = batch["moments"]
    noise = jax.random.normal(key, (*moments.shape[:-1], moments.shape[-1] // 2))
    return draw_latents(moments, noise, latent_scale)
