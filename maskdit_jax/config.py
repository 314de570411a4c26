"""Configurations: fill in sizes, check every value before anything is built."""

import math
from typing import Any

from maskdit_jax.diffusion.samplers import SamplerOptions
from maskdit_jax.errors import UserError, known
from maskdit_jax.models.blocks import REMAT_POLICIES, UNROLL_CHOICES
from maskdit_jax.models.maskdit import PRECISIONS, SIZES
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
    model.decoder_hidden_size model.decoder_depth model.decoder_num_heads data.num_threads
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
            shown = value if value.bit_length() < 100 else f"a number of {value.bit_length():,} bits"
            _require(value <= most, f"{name}={shown} must be at most {most:,}")
        _require(math.isfinite(value), f"{name}={value} must be finite")
        _require(value >= 1 or name not in AT_LEAST_ONE, f"{name}={value} must be at least 1")
        _require(value > 0 or name not in POSITIVE, f"{name}={value} must be greater than 0")
        _require(value >= 0 or name not in NOT_NEGATIVE, f"{name}={value} must not be negative")
        _require(0 <= value <= 1 or name not in SHARES, f"{name}={value} must be between 0 and 1")
    _require(config.data.max_zoom >= 1, f"data.max_zoom={config.data.max_zoom} must be at least 1")
    rows, columns = config.report.preview_rows, config.report.preview_columns
    _require(
        rows * columns <= MAX_PREVIEWS,
        f"report.preview_rows={rows} × report.preview_columns={columns} are {rows * columns:,} images, more "
        f"than {MAX_PREVIEWS:,}",
    )
    SamplerOptions(**config.sampling.to_dict()).check("sampling.")


def _check_model(config: ConfigDict) -> None:
    m, d = config.model, config.diffusion
    _require(
        m.image_size % m.patch_size == 0,
        f"model.patch_size={m.patch_size} does not divide model.image_size={m.image_size}",
    )
    stacks = [("hidden_size", "num_heads")]
    if m.use_decoder:
        stacks.append(("decoder_hidden_size", "decoder_num_heads"))
    else:
        _require(
            d.mae_coef == 0,
            f"diffusion.mae_coef={d.mae_coef} needs a decoder; set it to 0 with model.use_decoder=false",
        )
    for width, heads in stacks:
        _require(
            m[heads] <= m[width] and m[width] % m[heads] == 0,
            f"model.{heads}={m[heads]} does not divide model.{width}={m[width]}",
        )
        _require(m[width] % 4 == 0, f"model.{width}={m[width]} must be a multiple of 4")
    tokens = (m.image_size // m.patch_size) ** 2
    _require(
        tokens <= MAX_TOKENS,
        f"model.image_size={m.image_size} in patches of {m.patch_size} makes {tokens:,} tokens, at most "
        f"{MAX_TOKENS:,} are possible; use a larger model.patch_size",
    )
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
