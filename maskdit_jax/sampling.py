"""From a method and its parameters to denoised images and samples, on a mesh."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from numpy.typing import ArrayLike

from maskdit_jax.config import ConfigDict, compute_of, method_of, shape_of
from maskdit_jax.data.codec import Codec
from maskdit_jax.diffusion.edm import Denoiser
from maskdit_jax.diffusion.guidance import guide, null_label_sides
from maskdit_jax.diffusion.solvers import SamplerOptions, count_network_calls, generate
from maskdit_jax.distributed.mesh import AXES, batch_sharding, repeat_to, to_host, to_mesh
from maskdit_jax.errors import UserError, known, shown
from maskdit_jax.interop import layout_of
from maskdit_jax.log import counted
from maskdit_jax.methods.method import Method, Params, network_graph

MAX_SEED = 2**32 - 1
MAX_BATCH_SIZE = 2**16


class Origin(NamedTuple):
    """Where a model's weights come from: run folder, training step, and "ema" or "params"."""

    workdir: Path
    step: int
    weights: str


class Model:
    """A denoiser: its resolved `config`, its `params`, and the `mesh` over which samples are spread.

    `codec` turns its latents into images, if it has an autoencoder; `origin` says which weights it has;
    `class_names` are those of its labels 0, 1, …, empty where the data had none.
    """

    def __init__(
        self,
        config: ConfigDict,
        params: Params,
        mesh: Mesh,
        codec: Codec,
        origin: Origin | None = None,
        class_names: Sequence[str] = (),
    ):
        self.config, self.params, self.mesh = config, params, mesh
        self.codec, self.origin, self.class_names = codec, origin, tuple(class_names)
        self.method, self.shape = method_of(config), shape_of(config)
        self.image_shape = (self.shape.image_size, self.shape.image_size, self.shape.channels)
        self._network = _Network(self.method, network_graph(self.method, self.shape, compute_of(config)))

    def __repr__(self) -> str:
        layout = layout_of(self.config.method.name)
        classes = self.shape.num_classes
        words = [
            layout.model_name(self.method.network) if layout else self.config.method.name,
            counted(sum(x.size for x in jax.tree.leaves(self.params)), "parameter"),
            f"{self.codec.space} {list(self.image_shape)}",
            counted(classes, "class", "classes") if classes else "unconditional",
        ]
        if self.origin:
            weights = {"ema": "EMA", "params": "raw weights"}[self.origin.weights]
            words.append(f"{weights} of step {self.origin.step:,} in {self.origin.workdir}")
        return f"Model({', '.join([*words, self.config.compute.precision])})"

    def __call__(
        self, x: ArrayLike, sigma: ArrayLike, labels: ArrayLike | None = None, cfg_scale: float = 1.0
    ) -> jax.Array:
        """Denoised [B, H, W, C] for x = clean + sigma·noise [B, H, W, C].

        Of which channels guidance is, and whether it grows, the run's configuration says.

        Args:
          sigma: noise levels [B], or one for all; above 0.
          labels: classes [B], or one for all, by number or name; -1, or None for all, is no class.
          cfg_scale: guidance; 1 is none.

        Raises:
          UserError: a shape, noise level or label that cannot be. Under the caller's own `jax.jit`, where
            there are no values yet, shapes alone are looked at.
        """
        x = jnp.asarray(x)
        if x.shape[1:] != self.image_shape or x.ndim != 4:
            raise UserError(f"x has shape {list(x.shape)}, expected {['B', *self.image_shape]}")
        count = len(x)
        if not isinstance(sigma, jax.core.Tracer):
            sigma = check_sigma(sigma)
        if not isinstance(labels, jax.core.Tracer):
            labels = self.label_numbers(-1 if labels is None else labels)
        for name, values in (("sigma", sigma), ("labels", labels)):
            if np.shape(values) not in ((), (count,)):
                raise UserError(
                    f"{name} has shape {list(np.shape(values))}, expected [{count}] or one for all"
                )
        sampling = self.config.sampling
        how = sampling.guided_channels, sampling.cfg_growth
        sigma, labels = jnp.broadcast_to(sigma, count), jnp.broadcast_to(labels, count)
        return _denoise(self.params, x, sigma, labels, self._network, cfg_scale, *how)

    def sample(
        self,
        seeds: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        noise: np.ndarray | None = None,
        batch_size: int = 16,
        weak: "Model | None" = None,
        progress: bool = False,
        **options: Any,
    ) -> np.ndarray:
        """Samples [n, H, W, C] float32, one for each seed: latents, or with an autoencoder images in [-1, 1].

        An image is a function of the weights, its seed, its label and the options only.

        Args:
          seeds: integers 0 … 2³² - 1.
          labels: classes by number or name, one for each seed or one for all, -1 = no class; by default seed
            modulo the number of classes.
          noise: unit normal noise [n, H, W, C] to start from, instead of the draws from the seeds.
          batch_size: images of one call of the network on each device. The last call is filled up, so that
            there is one program, and an image the same to the last bit on any number of devices.
          weak: the model that guidance leads away from, given the same labels: an earlier step or a smaller
            network (autoguidance, arXiv 2406.02507); by default this one without labels.
          progress: show a bar on standard error, which moves with every call of the network's program.
          **options: fields of `SamplerOptions` (cfg_scale, num_steps, guidance_interval, solver, …);
            the others come from the run's configuration.

        Raises:
          UserError: an option, seed or label that does not exist, or noise or a weak model of another shape.
        """
        sampler, seed_array = self.sampler_options(weak, **options), check_seeds(seeds)
        label_array, count = self.check_labels(seed_array, labels), len(seed_array)
        if noise is not None and np.shape(noise) != (count, *self.image_shape):
            raise UserError(f"noise has shape {np.shape(noise)}, expected {(count, *self.image_shape)}")
        check_batch_size(batch_size)
        batch_size *= self.mesh.size
        images = []
        for start in _shown_progress(range(0, count, batch_size), progress):
            part = slice(start, start + batch_size)
            drawn = [x[part] for x in (seed_array, label_array, noise) if x is not None]
            filled = [np.asarray(repeat_to(x, batch_size)) for x in drawn]
            batch = _sample(
                self.params,
                weak.params if weak else None,
                *(to_mesh(x, batch_sharding(self.mesh)) for x in filled),
                **self._program(weak, sampler),
            )
            images.append(to_host(self.codec.images(batch))[: len(seed_array[part])])
        return np.concatenate(images)

    def lower(self, *, batch_size: int = 16, **options: Any) -> jax.stages.Lowered:
        """The program of `sample` for calls of `batch_size` images on each device, to look at or to compile.

        The parameters may be shapes here, and the devices a topology's.
        """
        sharding, count = batch_sharding(self.mesh), batch_size * self.mesh.size
        seeds, labels = (jax.ShapeDtypeStruct((count,), t, sharding=sharding) for t in (np.uint32, np.int32))
        program = self._program(None, self.sampler_options(**options))
        return _sample.lower(self.params, None, seeds, labels, **program)

    def _program(self, weak: "Model | None", options: SamplerOptions) -> dict[str, Any]:
        return {
            "mesh": self.mesh,
            "network": self._network,
            "weak_network": weak._network if weak else None,
            "image_shape": self.image_shape,
            "options": options,
        }

    @property
    def makes_pixels(self) -> bool:
        """Whether samples are images; otherwise they are latents."""
        return self.codec.makes_pixels

    def nfe(self, weak: "Model | None" = None, **options: Any) -> int:
        """Evaluations of a network that `sample` makes for each image; a guided call is two.

        Raises:
          UserError: as `sample`.
        """
        return count_network_calls(self.sampler_options(weak, **options), self.method.noise_levels())

    def sampler_options(self, weak: "Model | None" = None, **options: Any) -> SamplerOptions:
        """The run's sampler options, with those given here in their place, checked, as is the weak model."""
        names = [field.name for field in dataclasses.fields(SamplerOptions)]
        for name in options:
            if name not in names:
                raise UserError(f"sampling option {name!r} is unknown; known: {known(name, names)}")
        chosen = SamplerOptions(**self.config.sampling.to_dict() | options)
        chosen.check(levels=self.method.noise_levels())
        if weak:
            _check_alike(self, weak)
        elif chosen.cfg_scale != 1 and not self.shape.num_classes:
            chosen = dataclasses.replace(chosen, cfg_scale=1.0)  # nothing to guide towards
        return chosen

    def check_labels(self, seeds: ArrayLike, labels: ArrayLike | None) -> np.ndarray:
        """Labels [n] int32, one for each seed: those given, checked, or the default of `sample`."""
        seed_array = whole_numbers("seeds", seeds).reshape(-1)
        if labels is None:
            classes = self.shape.num_classes
            labels = seed_array % classes if classes else np.full_like(seed_array, -1)
        numbers = self.label_numbers(labels)
        if not numbers.ndim:
            return np.repeat(numbers, len(seed_array))
        if numbers.shape != seed_array.shape:
            raise UserError(
                f"{len(numbers)} labels for {len(seed_array)} seeds: give one label for each seed"
            )
        return numbers

    def label_numbers(self, labels: Any) -> np.ndarray:
        """Labels int32, shaped like those given, by number or name, which must be the model's."""
        names = np.asarray(labels)
        if names.dtype.kind == "U":
            labels = np.reshape([self._number_of(str(name)) for name in names.flat], names.shape)
        numbers, num_classes = whole_numbers("labels", labels), self.shape.num_classes
        if numbers.size and (numbers.min() < -1 or numbers.max() >= num_classes):
            known_labels = f"0 … {num_classes - 1} and -1, no class" if num_classes else "-1, no class, only"
            raise UserError(f"labels {numbers.min()} … {numbers.max()}: the model knows {known_labels}")
        return numbers.astype(np.int32)

    def _number_of(self, name: str) -> int:
        if name not in self.class_names:
            classes = known(name, self.class_names) if self.class_names else "none by name"
            raise UserError(f"labels: the class {name!r} is unknown; known: {classes}")
        return self.class_names.index(name)


def whole_numbers(name: str, values: ArrayLike) -> np.ndarray:
    """int64 of whole numbers under a name; no fractions, however small, and no truth values.

    Raises:
      UserError: they are something else.
    """
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise UserError(f"{name}={shown(values)}: expected whole numbers")
    return array.astype(np.int64)


def check_sigma(sigma: ArrayLike) -> np.ndarray:
    """Noise levels float32, shaped like those given, which must be some."""
    array = np.asarray(sigma)
    # Written so that NaN is refused too.
    if array.dtype.kind not in "iuf" or not ((array > 0) & np.isfinite(array)).all():
        raise UserError(f"sigma={shown(sigma)}: noise levels are finite numbers above 0")
    return array.astype(np.float32)


def check_seeds(seeds: ArrayLike) -> np.ndarray:
    """Seeds [n] uint32, of integers that are."""
    wide = whole_numbers("seeds", seeds).reshape(-1)
    if not wide.size or wide.min() < 0 or wide.max() > MAX_SEED:
        raise UserError(f"seeds must be one or more integers from 0 to {MAX_SEED}")
    return wide.astype(np.uint32)


def check_batch_size(batch_size: int) -> None:
    """Refuse a number of images that no device is given at once."""
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise UserError(f"batch_size={batch_size}: expected 1 … {MAX_BATCH_SIZE:,} images per device")


def _shown_progress(starts: Iterable[int], show: bool) -> Iterable[int]:
    """The same, with a bar where it is to be shown."""
    if not show:
        return starts
    from tqdm import tqdm

    return tqdm(starts, desc="sampling", unit="batch")


def _check_alike(model: Model, weak: Model) -> None:
    """Both must speak of the same data, on the same devices."""
    data, weak_data = (
        m.shape._asdict() | {"space": m.codec.space, "latent_scale": m.codec.latent_scale}
        for m in (model, weak)
    )
    for name, value in data.items():
        if weak_data[name] != value:
            raise UserError(f"the weak model has {name} {weak_data[name]}, this one {value}: take one alike")
    if weak.mesh != model.mesh:
        raise UserError("the weak model is on other devices than this one: load both alike")


class _Network(NamedTuple):
    """What of a model decides a program."""

    method: Method
    graphdef: nnx.GraphDef

    def denoiser(self, params: Params) -> Denoiser:
        return self.method.denoiser(nnx.merge(self.graphdef, params))


@functools.partial(jax.jit, static_argnames=("network", "cfg_scale", "channels", "power"))
def _denoise(params, x, sigma, labels, network, cfg_scale, channels, power):
    denoise = guided = network.denoiser(params)
    if cfg_scale != 1:
        growth = SamplerOptions(cfg_growth=power).growth(network.method.noise_levels())
        guided = guide(null_label_sides(denoise), cfg_scale, channels, growth)
    return guided(x, jnp.asarray(sigma, jnp.float32), labels)[..., : x.shape[-1]]


@functools.partial(jax.jit, static_argnames=("mesh", "network", "weak_network", "image_shape", "options"))
def _sample(
    params, weak_params, seeds, labels, noise=None, *, mesh, network, weak_network, image_shape, options
):
    levels = network.method.noise_levels()

    def on_one_device(params, weak_params, seeds, labels, noise):
        weak = weak_network.denoiser(weak_params) if weak_network else None
        return generate(network.denoiser(params), seeds, labels, image_shape, options, noise, levels, weak)

    # Written out, so that each device runs the program that one alone would: cut by the compiler, a program's
    # images differ in their last bits.
    items, whole = PartitionSpec(AXES), PartitionSpec()
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(whole, whole, items, items, items),
        out_specs=items,
        check_vma=False,
    )(params, weak_params, seeds, labels, noise)
