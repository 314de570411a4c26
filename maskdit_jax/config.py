"""Configurations: fill in sizes, check every value before anything is built."""

import math
from typing import Any, get_type_hints

from maskdit_jax.diffusion.solvers import SamplerOptions
from maskdit_jax.errors import UserError, first_line, known, shown
from maskdit_jax.models.blocks import REMAT_POLICIES, UNROLL_CHOICES
from maskdit_jax.models.maskdit import PRECISIONS, SIZES, MaskDiT
from maskdit_jax.models.masking import count_kept
from maskdit_jax.training.optimizer import MASK_SCHEDULES

try:
    from ml_collections import ConfigDict
except ModuleNotFoundError:

    class ConfigDict(dict):  # type: ignore[no-redef]
        """The part of ml_collections' ConfigDict that configs use, so that the benchmark runs without it."""

        _locked = False

        def __init__(self, values=()):
            super().__init__()
            self.update(**dict(values))

        def __getattr__(self, name):
            try:
                return self[name]
            except KeyError:
                raise AttributeError(name) from None

        def __setattr__(self, name, value):
            if self._locked and name not in self:
                raise AttributeError(f"{name!r} is unknown; known: {known(name, self)}")
            self[name] = ConfigDict(value) if type(value) is dict else value

        def update(self, **values):
            for name, value in values.items():
                setattr(self, name, value)

        def lock(self):
            for section in self.values():
                if isinstance(section, ConfigDict):
                    section.lock()
            vars(self)["_locked"] = True
            return self

        def to_dict(self):
            return {k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in self.items()}


CHOICES = {
    "model.precision": PRECISIONS,
    "model.remat": REMAT_POLICIES,
    "model.unroll": UNROLL_CHOICES,
    "diffusion.mask_schedule": MASK_SCHEDULES,
    "data.space": ("latents", "pixels"),
}
AT_LEAST_ONE = """
    model.depth model.hidden_size model.num_heads model.patch_size model.image_size model.channels
    model.decoder_hidden_size model.decoder_depth model.decoder_num_heads data.num_threads data.max_zoom
    training.num_steps training.batch_size training.accumulate training.max_nonfinite_steps mesh.fsdp
    checkpoint.every_steps checkpoint.keep report.every_steps report.preview_rows
    report.preview_columns
""".split()
POSITIVE = """
    diffusion.sigma_data diffusion.P_std data.latent_scale optimizer.learning_rate optimizer.eps
""".split()
NOT_NEGATIVE = """
    seed model.num_classes diffusion.mae_coef diffusion.mask_schedule_steps optimizer.warmup_kimg
    optimizer.weight_decay optimizer.clip_norm mesh.data checkpoint.keep_every_steps report.preview_steps
    evaluation.num_samples
""".split()
SHARES = """
    diffusion.label_dropout diffusion.mask_ratio diffusion.mask_ratio_min training.ema_decay
    optimizer.b1 optimizer.b2
""".split()
# Far beyond what anybody trains. What is larger is a slip, over which XLA would abort the process, or numpy
# ask for terabytes, before any line of ours could say so.
AT_MOST = {
    "seed": 2**32 - 1,  # JAX drops the bits above
    "model.depth": 1_000,
    "model.hidden_size": 2**16,
    "model.decoder_depth": 1_000,
    "model.decoder_hidden_size": 2**16,
    "model.image_size": 2**14,
    "model.channels": 2**12,
    "model.num_classes": 10**7,
    "data.num_threads": 1_000,
    "training.batch_size": 2**20,
    "evaluation.num_samples": 10**6,
}
MAX_INTEGER = 2**31 - 1  # of every other whole number: the counters of the training state are int32
MAX_TOKENS = 2**16
IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
MAX_PREVIEWS = 10_000  # images of one grid, sampled at once


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Every option by its full name, such as `training.num_steps`."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, (ConfigDict, dict))
        found |= leaves(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def resolve(config: ConfigDict, *, device_count: int) -> ConfigDict:
    """A checked, locked copy with the model's size filled in and the mesh made explicit.

    Raises:
      UserError: a value or a combination of values that cannot work.
    """
    config = ConfigDict(config.to_dict())
    _resolve_size(config.model)
    _check_values(config)
    _check_model(config)
    _check_devices(config, device_count)
    return config.lock()


def network_options(config: ConfigDict) -> dict[str, Any]:
    """Arguments of `MaskDiT` for a resolved configuration."""
    options = config.model.to_dict()
    del options["size"]
    return options | {"use_mask_token": config.diffusion.mae_coef > 0}


def _resolve_size(model: ConfigDict) -> None:
    numbers = ("depth", "hidden_size", "num_heads", "patch_size")
    if model.size == "custom":
        preset = (0, 0, 0, 0)
    else:
        name, _, patch = model.size.partition("/")
        if name not in SIZES or patch not in ("2", "4", "8"):
            raise UserError(
                f"model.size={model.size!r} is unknown; known: {', '.join(SIZES)} followed by /2, /4 "
                "or /8, or custom"
            )
        preset = (*SIZES[name], int(patch))
    for number, value in zip(numbers, preset, strict=True):
        model[number] = model[number] or value


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _check_values(config: ConfigDict) -> None:
    for name, value in leaves(config).items():
        if name in CHOICES:
            known_values = ", ".join(CHOICES[name])
            _require(value in CHOICES[name], f"{name}={value!r} is unknown; known: {known_values}")
        if isinstance(value, str):
            continue
        if isinstance(value, int):
            most = AT_MOST.get(name, MAX_INTEGER)
            _require(value <= most, f"{name}={shown(value)} must be at most {most:,}")
        _require(math.isfinite(value), f"{name}={value} must be finite")
        _require(value >= 1 or name not in AT_LEAST_ONE, f"{name}={value} must be at least 1")
        _require(value > 0 or name not in POSITIVE, f"{name}={value} must be greater than 0")
        _require(value >= 0 or name not in NOT_NEGATIVE, f"{name}={value} must not be negative")
        _require(0 <= value <= 1 or name not in SHARES, f"{name}={value} must be between 0 and 1")
    SamplerOptions(**config.sampling.to_dict()).check("sampling.")


def _check_model(config: ConfigDict) -> None:
    m, d = config.model, config.diffusion
    _check_network(m)
    _require(
        m.use_decoder or d.mae_coef == 0,
        f"diffusion.mae_coef={d.mae_coef} needs a decoder; set it to 0 with model.use_decoder=false",
    )
    tokens = (m.image_size // m.patch_size) ** 2
    _require(
        not d.mae_coef or m.patch_size**2 * m.channels > 1,
        f"diffusion.mae_coef={d.mae_coef}: a patch of one value (model.patch_size=1, model.channels=1) has "
        "no variance to be reconstructed by; use diffusion.mae_coef=0 or a larger patch",
    )
    for ratio in ("mask_ratio",) if d.mask_schedule == "constant" else ("mask_ratio", "mask_ratio_min"):
        at_most = math.floor(1000 * (1 - 1 / tokens)) / 1000
        _require(
            count_kept(tokens, d[ratio]) >= 1,
            f"diffusion.{ratio}={d[ratio]} hides all {tokens} patches; use at most {at_most}",
        )
    _require(
        not config.vae or config.data.space == "latents",
        f"vae={config.vae!r} decodes latents, but data.space='pixels'; leave it empty",
    )
    count = config.evaluation.num_samples
    _require(
        not count or config.data.source == "digits",
        f"evaluation.num_samples={count} is for data.source='digits'; set it to 0",
    )
    _require(count != 1, "evaluation.num_samples=1 has no covariance; use 0, no card, or at least 2")
    rows, columns = config.report.preview_rows, config.report.preview_columns
    _require(
        rows * columns <= MAX_PREVIEWS,
        f"report.preview_rows={rows} × report.preview_columns={columns} are {rows * columns:,} images, more "
        f"than {MAX_PREVIEWS:,}",
    )


def _check_network(model: ConfigDict) -> None:
    _require(
        model.image_size % model.patch_size == 0,
        f"model.patch_size={model.patch_size} does not divide model.image_size={model.image_size}",
    )
    tokens = (model.image_size // model.patch_size) ** 2
    _require(
        tokens <= MAX_TOKENS,
        f"model.image_size={model.image_size} in patches of {model.patch_size} makes {tokens:,} tokens, at "
        f"most {MAX_TOKENS:,} are possible; use a larger model.patch_size",
    )
    stacks = [("hidden_size", "num_heads")]
    stacks += [("decoder_hidden_size", "decoder_num_heads")] if model.use_decoder else []
    for width, heads in stacks:
        _require(
            model[heads] <= model[width] and model[width] % model[heads] == 0,
            f"model.{heads}={model[heads]} does not divide model.{width}={model[width]}",
        )
        _require(model[width] % 4 == 0, f"model.{width}={model[width]} must be a multiple of 4")


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


def _hints(of: Any, without: tuple[str, ...]) -> dict[str, type]:
    return {name: kind for name, kind in get_type_hints(of).items() if name not in without}


# What weights need of the configuration that was saved with them, which is all that an import has.
SAVED_WITH_WEIGHTS: dict[str, dict[str, type]] = {
    "model": {"size": str} | _hints(MaskDiT.__init__, without=("use_mask_token", "rngs", "return")),
    "diffusion": {"sigma_data": float, "mae_coef": float},
    "data": {"space": str, "latent_scale": float},
    "sampling": _hints(SamplerOptions, without=("guidance_interval",)),
}
# What is used, beyond that, of the configuration of a run.
_SAVED_WITH_RUNS = {
    "vae": str,
    "report.preview_rows": int,
    "report.preview_columns": int,
    "evaluation.num_samples": int,
}
_CLOSED = ("model", "sampling")  # these sections are arguments: nothing else may stand there


def saved_config(content: Any) -> ConfigDict:
    """The configuration that was saved with weights, found to have what their use needs.

    Raises:
      UserError: something is missing, of another type, or no value that `resolve` takes.
    """
    try:
        found = leaves(content)
        _check_types(found)
        config = ConfigDict(content)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the configuration cannot be used: {first_line(error, 100)}") from error
    _check_values(config)
    _check_network(config.model)
    return config


def _check_types(found: dict[str, Any]) -> None:
    """Compare options, by their full names, with what is used of a saved configuration."""
    kinds = {f"{s}.{name}": kind for s, names in SAVED_WITH_WEIGHTS.items() for name, kind in names.items()}
    missing = [name for name in kinds if name not in found]
    _require(not missing, f"the configuration lacks {', '.join(missing[:3])}")
    for name, value in found.items():
        closed = name.partition(".")[0] in _CLOSED and name not in kinds
        _require(not closed, f"the option {shown(name)} is unknown")
        kind = kinds.get(name) or _SAVED_WITH_RUNS.get(name) or type(value)
        fits = kind in IN_WORDS and _is_a(value, kind)
        _require(fits, f"{shown(name)}={shown(value)}: expected {IN_WORDS.get(kind, 'a number or a text')}")
        # A longer one cannot even be compared with a float.
        _require(not isinstance(value, int) or abs(value) < 2**63, f"{shown(name)} is no 64-bit number")


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
