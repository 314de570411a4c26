"""Configurations: load a file, apply overrides, fill in sizes, check every value before anything is built."""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any, get_type_hints

from maskdit_jax.diffusion.samplers import SOLVERS, SamplerOptions
from maskdit_jax.errors import UserError, first_line, known, shown
from maskdit_jax.models.blocks import REMAT_POLICIES, UNROLL_CHOICES
from maskdit_jax.models.maskdit import PRECISIONS, SIZES, MaskDiT
from maskdit_jax.models.masking import count_kept
from maskdit_jax.training.optimizer import MASK_SCHEDULES

try:
    from ml_collections import ConfigDict
except ModuleNotFoundError:

    class ConfigDict(dict):
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
    "sampling.solver": SOLVERS,
}
AT_LEAST_ONE = """
    model.depth model.hidden_size model.num_heads model.patch_size model.image_size model.channels
    model.decoder_hidden_size model.decoder_depth model.decoder_num_heads data.num_threads data.max_zoom
    training.num_steps training.batch_size training.accumulate training.max_nonfinite_steps mesh.fsdp
    checkpoint.every_steps checkpoint.keep report.every_steps report.preview_rows
    report.preview_columns sampling.num_steps
""".split()
POSITIVE = """
    diffusion.sigma_data diffusion.P_std data.latent_scale optimizer.learning_rate optimizer.eps
    sampling.sigma_min sampling.sigma_max sampling.rho
""".split()
NOT_NEGATIVE = """
    seed model.num_classes diffusion.mae_coef optimizer.warmup_kimg optimizer.weight_decay
    optimizer.clip_norm mesh.data checkpoint.keep_every_steps report.preview_steps sampling.S_churn
    sampling.S_min sampling.S_max sampling.S_noise sampling.cfg_scale evaluation.num_samples
""".split()
SHARES = """
    diffusion.label_dropout diffusion.mask_ratio diffusion.mask_ratio_min training.ema_decay
    optimizer.b1 optimizer.b2
""".split()


def load(path: str, overrides: list[str] = ()) -> ConfigDict:
    """Configuration of a Python file, with overrides such as `--config.training.num_steps=10`.

    Raises:
      UserError: no such file, unknown key (the message names the nearest ones) or wrong type.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        names = sorted(str(p) for p in file.parent.glob("*.py") if p.stem not in ("__init__", "base"))
        raise UserError(f"--config={path}: no such Python file; found: {known(path, names) or 'none'}")
    root = str(file.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)  # configs import each other as `configs.NAME`
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        config = module.get_config()
    except (AttributeError, KeyError, TypeError) as error:
        reason = error.args[0] if error.args else error
        while isinstance(reason, Exception):  # ml_collections wraps one error in another
            reason = reason.args[0]
        raise UserError(f"--config={path}: {' '.join(str(reason).split())}") from error
    for override in overrides:
        _apply(config, override)
    return config


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Every option by its full name, such as `training.num_steps`."""
    found = {}
    for name, value in config.items():
        nested = isinstance(value, (ConfigDict, dict))
        found |= leaves(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def _apply(config: ConfigDict, override: str) -> None:
    flag, separator, text = override.partition("=")
    options = leaves(config)
    name = flag.removeprefix("--config.")
    if not flag.startswith("--config.") or name not in options:
        near = known(name, [f"--config.{n}" for n in options], how_many=3)
        raise UserError(f"unknown option {flag}; nearest: {near}")
    if not separator:
        raise UserError(f"{flag} needs a value: {flag}=VALUE")
    *sections, leaf = name.split(".")
    for section in sections:
        config = config[section]
    config[leaf] = _parse(flag, text, type(options[name]))


def _parse(flag: str, text: str, kind: type) -> bool | int | float | str:
    if kind is bool:
        choices = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in choices:
            raise UserError(f"{flag}={text}: expected true or false")
        return choices[text.lower()]
    try:
        return kind(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{flag}={text}: expected {expected}") from None


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
        _require(math.isfinite(value), f"{name}={value} must be finite")
        _require(value >= 1 or name not in AT_LEAST_ONE, f"{name}={value} must be at least 1")
        _require(value > 0 or name not in POSITIVE, f"{name}={value} must be greater than 0")
        _require(value >= 0 or name not in NOT_NEGATIVE, f"{name}={value} must not be negative")
        _require(0 <= value <= 1 or name not in SHARES, f"{name}={value} must be between 0 and 1")
    s = config.sampling
    _require(
        s.sigma_min < s.sigma_max, f"sampling.sigma_min={s.sigma_min} must be below sigma_max={s.sigma_max}"
    )


def _check_model(config: ConfigDict) -> None:
    m, d = config.model, config.diffusion
    _check_network(m)
    _require(
        m.use_decoder or d.mae_coef == 0,
        f"diffusion.mae_coef={d.mae_coef} needs a decoder; set it to 0 with model.use_decoder=false",
    )
    tokens = (m.image_size // m.patch_size) ** 2
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


def _check_network(model: ConfigDict) -> None:
    _require(
        model.image_size % model.patch_size == 0,
        f"model.patch_size={model.patch_size} does not divide model.image_size={model.image_size}",
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
_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
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
        fits = kind in _IN_WORDS and _is_a(value, kind)
        _require(fits, f"{shown(name)}={shown(value)}: expected {_IN_WORDS.get(kind, 'a number or a text')}")
        # A longer one cannot even be compared with a float.
        _require(not isinstance(value, int) or abs(value) < 2**63, f"{shown(name)} is no 64-bit number")


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
