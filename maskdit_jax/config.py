"""Configurations: the sections that all methods share, and the checks that concern several of them."""

import os
from dataclasses import dataclass
from typing import Any

from maskdit_jax.config_dict import ConfigDict
from maskdit_jax.diffusion.solvers import SamplerOptions
from maskdit_jax.errors import UserError, shown
from maskdit_jax.methods import METHODS
from maskdit_jax.methods.method import Method, Shape
from maskdit_jax.models.compute import Compute
from maskdit_jax.options import as_section, check_options, describe_options, each_option, from_section, option

EMA_RULES = ("constant", "warmup")
INIT_WEIGHTS = ("both", "params", "ema")
MAX_PREVIEWS = 10_000  # images of one grid, sampled at once
FEATURES = ("pixels", "inception")
MAX_COMPARED = 2**12  # values of an image whose covariance can be taken


# Upper bounds are far beyond what anybody trains. What is larger is a slip, over which XLA would abort the
# process, or numpy ask for terabytes, before any line of ours could say so.
@dataclass(frozen=True)
class Run:
    """Options outside of any section."""

    seed: int = option(
        0,
        "of initialisation, data order and every random draw of training",
        at_least=0,
        at_most=2**32 - 1,  # JAX drops the bits above
    )
    init_from: str = option("", "folder of a run or import whose weights the run starts from")
    init_weights: str = option(
        "both", "of init_from: both sets as they are, or params or ema for both", choices=INIT_WEIGHTS
    )
    init_step: int = option(0, "step of init_from whose weights are taken; 0: the newest", at_least=0)
    vae: str = option(
        "", "the latents' autoencoder, to show samples as pixels: diffusers folder or .pth file"
    )


@dataclass(frozen=True)
class Data:
    """What the model sees, and where it comes from."""

    source: str = option("", "digits[:FIRST-LAST[:COUNT]], latents:FOLDER, folder:PATH or tfds:NAME")
    space: str = option(
        "latents", "what the model sees: latents, or pixels in [-1, 1]", choices=("latents", "pixels")
    )
    image_size: int = option(32, "height and width of what the model sees", at_least=1, at_most=2**14)
    channels: int = option(4, "channels of what the model sees", at_least=1, at_most=2**12)
    num_classes: int = option(1000, "0: unconditional", at_least=0, at_most=10**7)
    latent_scale: float = option(
        0.18215, "latents = latent_scale · autoencoder output; only for cached moments", above=0
    )
    num_threads: int = option(
        4,
        "reading threads of each process; 1 is fastest for latents in the page cache",
        at_least=1,
        at_most=1_000,
    )
    flip: bool = option(False, "mirror half of the images of folder: and tfds:")
    max_zoom: float = option(
        1.0, "random short side of 1 … max_zoom · image_size, random crop; 1: centre crop", at_least=1
    )
    max_unreadable: int = option(
        100,
        "images of folder: and tfds: that may be damaged; the next one stands in place of each",
        at_least=0,
    )


@dataclass(frozen=True)
class Training:
    """How long, and on how much at a time."""

    num_steps: int = option(2_000_000, "optimizer updates", at_least=1)
    batch_size: int = option(
        1024, "items per update, over all devices and processes", at_least=1, at_most=2**20
    )
    accumulate: int = option(
        1, "microbatches a batch is cut into, one after the other, to save memory", at_least=1
    )
    max_nonfinite_steps: int = option(100, "stop after so many skipped updates in a row", at_least=1)


@dataclass(frozen=True)
class Ema:
    """The average of the weights that samples are made with."""

    decay: float = option(0.9999, "per update", at_least=0, at_most=1)
    rule: str = option("constant", "constant, or warmup: from copies at first to `decay`", choices=EMA_RULES)


@dataclass(frozen=True)
class Optimizer:
    """AdamW."""

    learning_rate: float = option(1e-4, "after the warm-up", above=0)
    warmup_kimg: float = option(0.0, "linear warm-up, in thousands of items", at_least=0)
    b1: float = option(0.9, "decay of the mean of the gradient", at_least=0, at_most=1)
    b2: float = option(0.999, "decay of the mean of its square", at_least=0, at_most=1)
    eps: float = option(1e-8, "added to the root of that mean", above=0)
    weight_decay: float = option(0.0, "times the learning rate, on every parameter", at_least=0)
    clip_norm: float = option(0.0, "largest global norm of the gradient; 0: no clipping", at_least=0)


@dataclass(frozen=True)
class Mesh:
    """How devices share the work."""

    data: int = option(0, "devices along the data axis; 0: all that `fsdp` leaves", at_least=0)
    fsdp: int = option(1, "devices that share the parameters, EMA and optimizer state", at_least=1)


@dataclass(frozen=True)
class Checkpoint:
    """When a run is saved."""

    every_steps: int = option(5_000, "updates between checkpoints", at_least=1)
    keep: int = option(3, "newest checkpoints kept", at_least=1)
    keep_every_steps: int = option(
        0, "checkpoints of every so many updates are kept for good; 0: none", at_least=0
    )


@dataclass(frozen=True)
class Report:
    """What a person sees of a run."""

    every_steps: int = option(100, "updates between progress lines", at_least=1)
    tensorboard: bool = option(True, "write scalars and sample grids for TensorBoard")
    wandb: str = option("", "project of Weights & Biases that gets them too (extra `wandb`); empty: none")
    preview_steps: int = option(50_000, "updates between sample grids; 0: only at the end", at_least=0)
    preview_rows: int = option(10, "rows of the grid: the first classes", at_least=1)
    preview_columns: int = option(10, "columns of the grid: samples of each class", at_least=1)


@dataclass(frozen=True)
class Evaluation:
    """How good samples are: the card at the end of training, and one number during it."""

    num_samples: int = option(0, "samples of the card at the end; 0: no card", at_least=0, at_most=10**6)
    every_steps: int = option(0, "updates between measurements during training; 0: none", at_least=0)
    during_samples: int = option(
        1_000, "samples of such a measurement, whose name tells the number", at_least=2, at_most=10**6
    )
    features: str = option(
        "pixels", "compared are pixels (or latents) themselves, or inception's features", choices=FEATURES
    )
    inception: str = option("", "file of Inception's weights, for features=inception")
    reference: str = option(
        "", "file of tools/reference_stats.py; empty: the run's own data, of digits the held-out ones"
    )
    keep_best: bool = option(False, "keep the weights that measured best during training in WORKDIR/best")


SECTIONS = {
    "data": Data,
    "compute": Compute,
    "training": Training,
    "ema": Ema,
    "optimizer": Optimizer,
    "mesh": Mesh,
    "checkpoint": Checkpoint,
    "report": Report,
    "evaluation": Evaluation,
}
_NOT_IN_CONFIGS = ("guidance_interval",)  # of the sampler: a pair, and the choice of one command


def defaults(method: str = "maskdit") -> ConfigDict:
    """Every option with its default: those of all methods, and `method`'s own; locked.

    Raises:
      UserError: there is no such method.
    """
    if method not in METHODS:
        raise UserError(f"method.name={method!r} is unknown; known: {', '.join(METHODS)}")
    kind = METHODS[method]
    config = ConfigDict(as_section(Run()))
    config.method = {"name": method, **_unfilled(kind)}
    for name, section in SECTIONS.items():
        config[name] = ConfigDict(as_section(section()))
    config.sampling = sampling_section(kind.sampler)
    return config.lock()


def _unfilled(kind: type) -> dict[str, Any]:
    """The defaults of a record type as they are written, before it has filled in what follows from others."""
    section: dict[str, Any] = {}
    for name, field, _ in each_option(kind):
        *parents, last = name.split(".")
        node = section
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = field.default
    return section


def sampling_section(sampler: SamplerOptions) -> dict[str, Any]:
    """Sampler options as a configuration holds them."""
    return {name: value for name, value in as_section(sampler).items() if name not in _NOT_IN_CONFIGS}


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Every option by its full name, such as `training.num_steps`."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, (ConfigDict, dict))
        found |= leaves(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def described(config: ConfigDict) -> list[str]:
    """A line for every option of a configuration: its full name, its value and what it is for."""
    words = describe_options(Run) | describe_options(METHODS[config.method.name], "method.")
    for name, section in (SECTIONS | {"sampling": SamplerOptions}).items():
        words |= describe_options(section, f"{name}.")
    return [
        f"--config.{name}={value}  # {words[name]}" for name, value in leaves(config).items() if name in words
    ]


def method_of(config: ConfigDict) -> Method:
    """The method of a configuration, with its options."""
    return from_section(METHODS[config.method.name], config.method)


def shape_of(config: ConfigDict) -> Shape:
    """Shape of the data that a configuration's model sees."""
    return Shape(*(config.data[name] for name in Shape._fields))


def compute_of(config: ConfigDict) -> Compute:
    """How a configuration computes its network."""
    return from_section(Compute, config.compute)


def evaluation_of(config: ConfigDict) -> Evaluation:
    """The section evaluation; of a run that was saved before an option was there, with its default."""
    found, names = config.evaluation, [field for field, _, _ in each_option(Evaluation)]
    return Evaluation(**{name: found[name] for name in names if name in found})


def resolve(config: ConfigDict, *, device_count: int) -> ConfigDict:
    """A checked, locked copy with the network's size filled in and the mesh made explicit.

    Raises:
      UserError: a value or a combination of values that cannot work.
    """
    config = ConfigDict(config.to_dict())
    check_options(from_section(Run, config))
    for name, section in SECTIONS.items():
        check_options(from_section(section, config[name]), f"{name}.")
    check_method(config)
    _check_together(config)
    _check_devices(config, device_count)
    if config.vae:
        config.vae = os.path.abspath(config.vae)  # samples will be made from other folders too
    return config.lock()


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def check_method(config: ConfigDict) -> None:
    """The method alone, its sampler, and whether it fits the data; the network's size is filled in."""
    name = config.method.name
    _require(name in METHODS, f"method.name={shown(repr(name))} is unknown; known: {', '.join(METHODS)}")
    method = method_of(config)
    config.method.update(**as_section(method))
    check_options(method, "method.")
    method.check(shape_of(config))
    sampler = SamplerOptions(**config.sampling.to_dict())
    sampler.check("sampling.", levels=method.noise_levels())


def _check_together(config: ConfigDict) -> None:
    """What concerns several sections."""
    _require(
        not config.vae or config.data.space == "latents",
        f"vae={config.vae!r} decodes latents, but data.space='pixels'; leave it empty",
    )
    _check_evaluation(config)
    rows, columns = config.report.preview_rows, config.report.preview_columns
    _require(
        rows * columns <= MAX_PREVIEWS,
        f"report.preview_rows={rows} × report.preview_columns={columns} are {rows * columns:,} images, more "
        f"than {MAX_PREVIEWS:,}",
    )


def _check_evaluation(config: ConfigDict) -> None:
    evaluation, data = evaluation_of(config), config.data
    count, name = evaluation.num_samples, f"evaluation.features={evaluation.features!r}"
    _require(count != 1, "evaluation.num_samples=1 has no covariance; use 0, no card, or at least 2")
    _require(
        bool(evaluation.every_steps) or not evaluation.keep_best,
        "evaluation.keep_best=True keeps what measures best, but evaluation.every_steps=0 measures nothing",
    )
    if not (count or evaluation.every_steps):
        return
    if evaluation.features == "inception":
        _require(bool(evaluation.inception), f"{name} needs evaluation.inception=FILE, its weights")
        _require(
            data.space == "pixels" or bool(config.vae),
            f"{name} sees images, data.space='latents' are none: give their autoencoder as vae, or use "
            "evaluation.features=pixels, which compares latents",
        )
        return
    values = data.image_size**2 * data.channels
    _require(
        values <= MAX_COMPARED,
        f"{name}: an image of the model has {values:,} values, more than the {MAX_COMPARED:,} of which a "
        "covariance can be taken: use evaluation.features=inception, or set evaluation.num_samples and "
        "evaluation.every_steps to 0",
    )


def _check_devices(config: ConfigDict, device_count: int) -> None:
    mesh, training = config.mesh, config.training
    if mesh.data == 0:
        mesh.data = max(device_count // mesh.fsdp, 1)
    _require(
        mesh.data * mesh.fsdp == device_count,
        f"mesh.data={mesh.data} × mesh.fsdp={mesh.fsdp} is not the number of devices, {device_count}",
    )
    unit = device_count * training.accumulate
    if training.batch_size % unit:
        below = training.batch_size // unit * unit
        nearest = " or ".join(str(n) for n in (below, below + unit) if n)
        raise UserError(
            f"training.batch_size={training.batch_size} must divide by {device_count} devices × "
            f"{training.accumulate} microbatches; try {nearest}"
        )
