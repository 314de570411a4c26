"""The trained model as Python sees it: denoise with it, sample from it."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from maskdit_jax.config import ConfigDict, network_options
from maskdit_jax.data.codec import Autoencoder, load_autoencoder
from maskdit_jax.diffusion.edm import precondition
from maskdit_jax.diffusion.guidance import guide
from maskdit_jax.diffusion.solvers import SamplerOptions, generate
from maskdit_jax.errors import UserError, known
from maskdit_jax.log import log
from maskdit_jax.models.maskdit import PRECISIONS
from maskdit_jax.training.checkpoint import WEIGHTS, Checkpoints, open_run
from maskdit_jax.distributed.mesh import batch_sharding, make_mesh, place_shapes, repeat_to, to_host, to_mesh
from maskdit_jax.training.state import Params, init_params, network_graph

MAX_SEED = 2**32 - 1
MAX_BATCH_SIZE = 2**16


class Origin(NamedTuple):
    """Where a model's weights come from: run folder, training step, and "ema" or "params"."""

    workdir: Path
    step: int
    weights: str


def load(
    path: str | Path,
    weights: str = "ema",
    *,
    precision: str | None = None,
    vae: str | Path | None = None,
) -> "Model":
    """The newest healthy checkpoint of a run folder, or an import, as a Model.

    Args:
      path: folder of a run, or one that `import_torch` made.
      weights: "ema" or "params", the raw weights.
      precision: of compute, bfloat16, tf32 or float32; by default the run's.
      vae: the latents' autoencoder, with which `sample` gives images; by default the run's, "" for none.

    Raises:
      UserError: there is no such checkpoint or autoencoder, or it does not fit.
    """
    for name, value, choices in (("weights", weights, WEIGHTS), ("precision", precision, PRECISIONS)):
        if value is not None and value not in choices:
            raise UserError(f"{name}={value!r} is unknown; known: {', '.join(choices)}")
    checkpoints, mesh = open_run(path), make_mesh(jax.device_count(), 1)
    step, meta, params = checkpoints.newest_healthy(
        lambda step, meta: _restore(checkpoints, step, meta, mesh, weights)
    )
    checkpoints.close()
    config = ConfigDict(meta["config"])
    config.model.precision = precision or config.model.precision
    if vae is None:
        vae = config.get("vae")  # an import has none
    autoencoder = load_autoencoder(vae, config.model.precision) if vae else None
    origin = Origin(Path(path), step, weights)
    return Model(config, params, mesh, origin=origin, autoencoder=autoencoder)


def _restore(checkpoints: Checkpoints, step: int, meta: dict[str, Any], mesh: Mesh, weights: str) -> Params:
    options = network_options(ConfigDict(meta["config"]))
    shapes = place_shapes(jax.eval_shape(lambda: init_params(options, 0)), mesh)
    return checkpoints.restore_weights(step, meta, WEIGHTS[weights], shapes)


class Model:
    """A denoiser: its resolved `config`, its `params`, and the `mesh` over which samples are spread.

    `autoencoder`, if there is one, turns its latents into images; `origin` says which weights it has.
    """

    def __init__(
        self,
        config: ConfigDict,
        params: Params,
        mesh: Mesh,
        *,
        origin: Origin | None = None,
        autoencoder: Autoencoder | None = None,
    ):
        if autoencoder:
            _check_autoencoder(autoencoder, config)
        self.config, self.params, self.mesh = config, params, mesh
        self.origin, self.autoencoder = origin, autoencoder
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
        seeds: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        noise: np.ndarray | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> np.ndarray:
        """Samples [n, H, W, C] float32, one for each seed: latents, or with an autoencoder images in [-1, 1].

        An image is a function of the weights, its seed, its label and the options only.

        Args:
          seeds: integers 0 … 2³² - 1.
          labels: classes, -1 = no class; by default seed modulo the number of classes.
          noise: unit normal noise [n, H, W, C] to start from, instead of the draws from the seeds.
          batch_size: images of one call of the network on each device. The last call is filled up, so that
            there is one program, and an image the same to the last bit on any number of devices.
          **options: fields of `SamplerOptions` (cfg_scale, num_steps, guidance_interval, solver, …);
            the others come from the run's configuration.

        Raises:
          UserError: an option, seed or label that does not exist, or noise of another shape.
        """
        sampler, seed_array = self.sampler_options(**options), _check_seeds(seeds)
        label_array, count = self.check_labels(seed_array, labels), len(seed_array)
        if noise is not None and np.shape(noise) != (count, *self.image_shape):
            raise UserError(f"noise has shape {np.shape(noise)}, expected {(count, *self.image_shape)}")
        if not 1 <= batch_size <= MAX_BATCH_SIZE:
            raise UserError(f"batch_size={batch_size}: expected 1 … {MAX_BATCH_SIZE:,} images per device")
        batch_size *= self.mesh.size
        images = []
        for start in range(0, count, batch_size):
            part = slice(start, start + batch_size)
            drawn = [x[part] for x in (seed_array, label_array, noise) if x is not None]
            filled = [np.asarray(repeat_to(x, batch_size)) for x in drawn]
            batch = _sample(
                self.params,
                *(to_mesh(x, batch_sharding(self.mesh)) for x in filled),
                graphdef=self._graphdef,
                sigma_data=self.config.diffusion.sigma_data,
                image_shape=self.image_shape,
                options=sampler,
            )
            if self.autoencoder:
                batch = self.autoencoder.decode(batch / self.config.data.latent_scale)
            images.append(to_host(batch)[: len(seed_array[part])])
        return np.concatenate(images)

    @property
    def makes_pixels(self) -> bool:
        """Whether samples are images; otherwise they are latents."""
        return self.autoencoder is not None or self.config.data.space == "pixels"

    def with_weights(self, weights: str) -> "Model":
        """The same step of the same run with its other weights, "ema" or "params".

        Raises:
          UserError: the model was not loaded from a folder, or the folder has gone on since.
        """
        if self.origin is None:
            raise UserError("this model was not loaded from a folder: it has one set of weights")
        if weights == self.origin.weights:
            return self
        origin = self.origin._replace(weights=weights)
        checkpoints = open_run(origin.workdir)
        if origin.step not in checkpoints.steps:
            raise UserError(f"{origin.workdir} no longer holds step {origin.step:,}: load it anew")
        params = _restore(checkpoints, origin.step, checkpoints.meta(origin.step), self.mesh, weights)
        checkpoints.close()
        return Model(self.config, params, self.mesh, origin=origin, autoencoder=self.autoencoder)

    def sampler_options(self, **options: Any) -> SamplerOptions:
        """The run's sampler options, with those given here in their place, checked."""
        names = [field.name for field in dataclasses.fields(SamplerOptions)]
        for name in options:
            if name not in names:
                raise UserError(f"sampling option {name!r} is unknown; known: {known(name, names)}")
        chosen = SamplerOptions(**self.config.sampling.to_dict() | options)
        chosen.check()
        if chosen.cfg_scale != 1 and not self.config.model.num_classes:
            chosen = dataclasses.replace(chosen, cfg_scale=1.0)  # nothing to guide towards
        return chosen

    def check_labels(self, seeds: ArrayLike, labels: ArrayLike | None) -> np.ndarray:
        """Labels [n] int32, one for each seed: those given, checked, or the default of `sample`."""
        num_classes, wide_seeds = self.config.model.num_classes, np.asarray(seeds, np.int64).reshape(-1)
        if labels is None:
            wide = wide_seeds % num_classes if num_classes else np.full_like(wide_seeds, -1)
        else:
            wide = np.asarray(labels, np.int64).reshape(-1)
        if len(wide) != len(wide_seeds):
            raise UserError(f"{len(wide)} labels for {len(wide_seeds)} seeds: give one label for each seed")
        if wide.min() < -1 or wide.max() >= num_classes:
            raise UserError(
                f"labels {wide.min()} … {wide.max()}: the model knows 0 … {num_classes - 1} and -1, no class"
            )
        return wide.astype(np.int32)


def _check_autoencoder(autoencoder: Autoencoder, config: ConfigDict) -> None:
    if config.data.space != "latents":
        raise UserError("vae: this run's model makes pixels, there is nothing to decode")
    if autoencoder.channels != config.model.channels:
        raise UserError(
            f"vae: the autoencoder's latents have {autoencoder.channels} channels, the model's "
            f"{config.model.channels}"
        )
    if not math.isclose(autoencoder.latent_scale, config.data.latent_scale, rel_tol=1e-3):
        log.warning(
            f"warning: the autoencoder is published with the scale {autoencoder.latent_scale:g}, the model "
            f"was trained with data.latent_scale={config.data.latent_scale:g}: is it the right one?"
        )


def _check_seeds(seeds: ArrayLike) -> np.ndarray:
    wide = np.asarray(seeds, np.int64).reshape(-1)
    if not wide.size or wide.min() < 0 or wide.max() > MAX_SEED:
        raise UserError(f"seeds must be one or more integers from 0 to {MAX_SEED}")
    return wide.astype(np.uint32)


@functools.partial(jax.jit, static_argnames=("graphdef", "sigma_data", "cfg_scale"))
def _denoise(params, x, sigma, labels, graphdef, sigma_data, cfg_scale):
    denoise = precondition(nnx.merge(graphdef, params), sigma_data)
    return guide(denoise, cfg_scale)(x, jnp.asarray(sigma, jnp.float32), labels)


@functools.partial(jax.jit, static_argnames=("graphdef", "sigma_data", "image_shape", "options"))
def _sample(params, seeds, labels, noise=None, *, graphdef, sigma_data, image_shape, options):
    denoise = precondition(nnx.merge(graphdef, params), sigma_data)
    return generate(denoise, seeds, labels, image_shape, options, noise)
