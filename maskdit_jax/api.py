"""The trained model as Python sees it: denoise with it, sample from it."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from maskdit_jax.config import ConfigDict, network_options
from maskdit_jax.diffusion.edm import precondition
from maskdit_jax.diffusion.guidance import guide
from maskdit_jax.diffusion.samplers import SOLVERS, SamplerOptions, generate
from maskdit_jax.errors import UserError, known
from maskdit_jax.training.checkpoint import open_run
from maskdit_jax.training.mesh import batch_sharding, make_mesh, place_shapes
from maskdit_jax.training.state import Params, init_params, network_graph

MAX_SEED = 2**32 - 1
WEIGHTS = {"ema": "ema_params", "params": "params"}


def load(path: str | Path, weights: str = "ema") -> "Model":
    """The newest checkpoint of a run folder as a Model; `weights` is "ema" or "params".

    Raises:
      UserError: `path` holds no checkpoint.
    """
    checkpoints, config = open_run(path)
    options = network_options(config)
    mesh = make_mesh(jax.device_count(), 1)
    shapes = place_shapes(jax.eval_shape(lambda: init_params(options, 0)), mesh)
    params = checkpoints.restore_weights(WEIGHTS[weights], shapes)
    checkpoints.close()
    return Model(config, params, mesh)


class Model:
    """A denoiser: its resolved `config`, its `params`, and the `mesh` over which samples are spread."""

    def __init__(self, config: ConfigDict, params: Params, mesh: Mesh):
        self.config, self.params, self.mesh = config, params, mesh
        model = config.model
        self.image_shape = (model.image_size, model.image_size, model.channels)
        self._graphdef = network_graph(network_options(config))

    def __call__(
        self, x: jax.Array, sigma: jax.Array, labels: jax.Array, cfg_scale: float = 1.0
    ) -> jax.Array:
        """Denoised [B, H, W, C] for x [B, H, W, C], sigma [B], labels [B] int, -1 = no class."""
        sigma_data = self.config.diffusion.sigma_data
        return _denoise(self.params, x, sigma, labels, self._graphdef, sigma_data, cfg_scale)

    def sample(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        batch_size: int = 64,
        **options: Any,
    ) -> np.ndarray:
        """Samples [n, H, W, C] float32, one for each seed.

        An image is a function of the weights, its seed, its label and the options only.

        Args:
          seeds: integers 0 … 2³² - 1.
          labels: classes, -1 = no class; by default seed modulo the number of classes.
          batch_size: images per call of the network, rounded up to a multiple of the devices.
          **options: fields of `SamplerOptions` (cfg_scale, num_steps, guidance_interval, solver, …);
            the others come from the run's configuration.

        Raises:
          UserError: an option, seed or label that does not exist.
        """
        options = self.sampler_options(**options)
        seeds, labels = _check_seeds(seeds), self.check_labels(seeds, labels)
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        devices = self.mesh.size
        batch_size = -(-batch_size // devices) * devices
        images = []
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            # The last batch is filled up, so that there is one program.
            filled = np.resize(seeds[part], batch_size), np.resize(labels[part], batch_size)
            batch = _sample(
                self.params,
                *jax.device_put(filled, batch_sharding(self.mesh)),
                self._graphdef,
                self.config.diffusion.sigma_data,
                self.image_shape,
                options,
            )
            images.append(np.asarray(batch)[: len(seeds[part])])
        return np.concatenate(images)

    def sampler_options(self, **options: Any) -> SamplerOptions:
        """The run's sampler options, with those given here in their place, checked."""
        names = [field.name for field in dataclasses.fields(SamplerOptions)]
        for name in options:
            if name not in names:
                raise UserError(f"sampling option {name!r} is unknown; known: {known(name, names)}")
        chosen = SamplerOptions(**self.config.sampling.to_dict() | options)
        if chosen.solver not in SOLVERS:
            raise UserError(f"solver={chosen.solver!r} is unknown; known: {', '.join(SOLVERS)}")
        if chosen.num_steps < 1:
            raise UserError(f"num_steps={chosen.num_steps} must be at least 1")
        if not 0 < chosen.sigma_min < chosen.sigma_max < math.inf or chosen.rho <= 0:
            raise UserError(
                f"sigma_min={chosen.sigma_min}, sigma_max={chosen.sigma_max}, rho={chosen.rho}: expected "
                "0 < sigma_min < sigma_max and rho > 0"
            )
        if not 0 <= chosen.cfg_scale < math.inf or not 0 <= chosen.S_churn < math.inf:
            raise UserError(
                f"cfg_scale={chosen.cfg_scale}, S_churn={chosen.S_churn}: neither may be negative or infinite"
            )
        interval = chosen.guidance_interval
        if interval is not None and not interval[0] < interval[1]:
            raise UserError(f"guidance_interval={interval}: expected (low, high) with low < high")
        if chosen.cfg_scale != 1 and not self.config.model.num_classes:
            chosen = dataclasses.replace(chosen, cfg_scale=1.0)  # nothing to guide towards
        return chosen

    def check_labels(self, seeds: Sequence[int], labels: Sequence[int] | None) -> np.ndarray:
        """Labels [n] int32, one for each seed: those given, checked, or the default of `sample`."""
        num_classes = self.config.model.num_classes
        if labels is None:
            wide = np.asarray(seeds, np.int64) % num_classes if num_classes else np.full(len(seeds), -1)
        else:
            wide = np.asarray(labels, np.int64).reshape(-1)
        if len(wide) != len(seeds):
            raise UserError(f"{len(wide)} labels for {len(seeds)} seeds: give one label for each seed")
        if wide.min() < -1 or wide.max() >= num_classes:
            raise UserError(
                f"labels {wide.min()} … {wide.max()}: the model knows 0 … {num_classes - 1} and -1, no class"
            )
        return wide.astype(np.int32)


def _check_seeds(seeds: Sequence[int]) -> np.ndarray:
    wide = np.asarray(seeds, np.int64).reshape(-1)
    if not wide.size or wide.min() < 0 or wide.max() > MAX_SEED:
        raise UserError(f"seeds must be one or more integers from 0 to {MAX_SEED}")
    return wide.astype(np.uint32)


@functools.partial(jax.jit, static_argnames=("graphdef", "sigma_data", "cfg_scale"))
def _denoise(params, x, sigma, labels, graphdef, sigma_data, cfg_scale):
    denoise = precondition(nnx.merge(graphdef, params), sigma_data)
    return guide(denoise, cfg_scale)(x, jnp.asarray(sigma, jnp.float32), labels)


@functools.partial(jax.jit, static_argnames=("graphdef", "sigma_data", "image_shape", "options"))
def _sample(params, seeds, labels, graphdef, sigma_data, image_shape, options):
    denoise = precondition(nnx.merge(graphdef, params), sigma_data)
    return generate(denoise, seeds, labels, image_shape, options)
