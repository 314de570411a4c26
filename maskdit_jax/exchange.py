"""Weights in and out: a PyTorch file → a folder that works like a run's, and a run → a PyTorch file."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from maskdit_jax.config import SAVED_WITH_WEIGHTS, ConfigDict, network_options, saved_config
from maskdit_jax.diffusion.solvers import SamplerOptions
from maskdit_jax.errors import UserError, shown
from maskdit_jax.files import appears_whole, read_json
from maskdit_jax.interop.names import (
    Shapes,
    from_torch,
    model_name,
    read_options,
    to_torch,
)
from maskdit_jax.interop.torch_io import (
    Tensors,
    as_float32,
    check_shapes,
    read_file,
    shapes_of,
    write_file,
)
from maskdit_jax.log import counted, log
from maskdit_jax.model_card import WEIGHTS_IN_WORDS, model_card
from maskdit_jax.models.maskdit import SIZES
from maskdit_jax.training.checkpoint import WEIGHTS, Checkpoints
from maskdit_jax.training.state import Params, init_params

if TYPE_CHECKING:
    from maskdit_jax.api import Model

CONFIG, CARD = "config.json", "MODEL_CARD.md"
# Names of the weights in a .pt file, as the authors' code writes and loads them, and ours.
PICKLED_SETS = {"model": "params", "ema": "ema"}


def import_torch(
    source: str | Path | Tensors,
    out_dir: str | Path,
    model: str | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
) -> None:
    """Make a folder of the weights in a PyTorch file; `load`, `sample` and `init_from` take it like a run's.

    Names, shapes and the fixed position tables must be exactly those of a MaskDiT, or of its plain
    DiT; nothing is written otherwise. Every value is kept to the bit. A file without `config.json` of
    `export_torch` beside it is taken to be a published one: latents, sigma_data 0.5, scale 0.18215.

    Args:
      source: a .safetensors or .pt file, or the tensors by name, of torch or numpy. {"model": …,
        "ema": …} gives both the raw weights and their EMA; otherwise one set stands for both.
      out_dir: new folder.
      model, image_size, num_classes: what is expected, such as "MaskDiT-XL/2", 32 (latent pixels),
        1000; read from the tensors, and compared with these where given.
      num_heads, decoder_num_heads: only for sizes that are not published ones, where neither the
        tensors nor a `config.json` tell them.

    Raises:
      UserError: the file is damaged, unsafe or does not fit, or `out_dir` is not empty.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} exists and is not an empty folder: choose a new one")
    where, num_bytes, content, beside = _read(source)
    sets = _weight_sets(content, where, beside.get("weights", "ema"))
    places = {name: f"{where} (EMA)" if len(sets) == 2 and name == "ema" else where for name in sets}
    shapes = {name: shapes_of(tensors, places[name], num_bytes) for name, tensors in sets.items()}
    options = _read_checked_options(next(iter(shapes.values())), where)
    _compare_with_expected(options, where, model=model, image_size=image_size, num_classes=num_classes)
    options |= _read_heads(options, where, beside, num_heads, decoder_num_heads)
    config = _config_of(options, beside, where)

    expected = _expected_shapes(config)
    for name, found in shapes.items():
        check_shapes(found, expected, places[name], _describe(options))
    params = {}
    for name, tensors in sets.items():
        arrays = as_float32(tensors, places[name])
        params[WEIGHTS[name]] = from_torch(arrays, patch_size=options["patch_size"])
        half = str(tensors["model.pos_embed"].dtype).endswith("float16")
        _check_position_tables(arrays, params[WEIGHTS[name]], options, where, 2**-8 if half else 1e-6)

    step = beside.get("step", 0)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with appears_whole(out_dir) as partial:
        checkpoints = Checkpoints(partial, keep=1)
        checkpoints.save_weights(step, params, {"config": config.to_dict(), "imported_from": where})
        checkpoints.close()
    count = sum(x.size for x in jax.tree.leaves(next(iter(params.values()))))
    log.info(
        f"imported {where} to {out_dir}: {_describe(options)}, {count:,} parameters, "
        + ("raw weights and EMA" if len(params) == 2 else "one set, for raw weights and EMA")
        + "; no optimizer state: training from it (--config.init_from) starts a fresh optimizer"
    )


def _read(source: str | Path | Tensors) -> tuple[str, int | None, dict[str, Any], dict[str, Any]]:
    """Where from, for messages; the size of the file; its content; what the config.json beside it says."""
    if isinstance(source, Mapping):
        return "the state dict", None, dict(source), {}
    path = Path(source)
    content = read_file(path)
    return str(source), path.stat().st_size, content, _read_config(path)


def _expected_shapes(config: ConfigDict) -> Shapes:
    sizes = {name: config.model[name] for name in ("image_size", "patch_size")}
    tensors = jax.eval_shape(lambda: to_torch(init_params(network_options(config), 0), **sizes))
    return {name: tuple(x.shape) for name, x in tensors.items()}


def _weight_sets(content: Mapping[str, Any], where: str, single: str) -> dict[str, Tensors]:
    """The weights in a file by our names, `params` and `ema`; tensors alone are the set `single`."""
    sets = {
        ours: content[name] for name, ours in PICKLED_SETS.items() if isinstance(content.get(name), Mapping)
    }
    if sets:
        ignored = sorted(shown(name) for name in content.keys() - PICKLED_SETS.keys())
        if ignored:
            more = ", …" if len(ignored) > 10 else ""
            log.info(f"{where}: not taken: {', '.join(ignored[:10])}{more}")
        return sets
    if not content:
        raise UserError(f"{where} holds no tensors")
    return {single: content}


def _read_checked_options(shapes: Shapes, where: str) -> dict[str, Any]:
    try:
        return read_options(shapes)
    except KeyError as error:
        some = ", ".join(shown(name) for name in list(shapes)[:3])
        raise UserError(f"{where} is no MaskDiT: it has no {error.args[0]}; it has {some}, …") from None
    except ValueError as error:
        raise UserError(f"{where} is no MaskDiT: {error}") from None


def _compare_with_expected(options: dict[str, Any], where: str, **expected: Any) -> None:
    found = options | {"model": model_name(options)}
    differences = [
        f"{name}={value} expected, {found[name]} found"
        for name, value in expected.items()
        if value is not None and value != found[name]
    ]
    if differences:
        raise UserError(f"{where}: {'; '.join(differences)}")


def _read_heads(
    options: dict[str, Any],
    where: str,
    beside: dict[str, Any],
    num_heads: int | None,
    decoder_num_heads: int | None,
) -> dict[str, int]:
    """Heads of encoder and decoder: those given, of the config.json, or of the published sizes."""
    published = {(depth, width): heads for depth, width, heads in SIZES.values()}
    known = beside.get("model", {})
    heads = num_heads or known.get("num_heads") or published.get((options["depth"], options["hidden_size"]))
    decoder_width = options.get("decoder_hidden_size", 512)
    decoder_heads = (
        decoder_num_heads or known.get("decoder_num_heads") or (16 if decoder_width == 512 else None)
    )
    found: dict[str, int] = {}
    for name, value, width in (
        ("num_heads", heads, options["hidden_size"]),
        ("decoder_num_heads", decoder_heads, decoder_width),
    ):
        if value is None:
            raise UserError(
                f"{where}: {_describe(options)} is no published size, and tensors do not tell {name}: give "
                f"{name}, or put the {CONFIG} of its export beside the file"
            )
        if not isinstance(value, int) or value < 1 or width % value:
            raise UserError(f"{where}: {name}={value} does not divide the width {width}")
        found[name] = value
    return found


def _config_of(options: dict[str, Any], beside: dict[str, Any], where: str) -> ConfigDict:
    """The part of a run's configuration that its weights need to be used."""
    options = dict(options)
    has_mask_token = options.pop("use_mask_token")
    sampling = dataclasses.asdict(SamplerOptions())
    del sampling["guidance_interval"]
    sections = {
        "model": {
            "size": model_name(options).partition("-")[2] or "custom",
            "decoder_hidden_size": 512,
            "decoder_depth": 8,
            **options,
            # Parity first; `load` and `sample` take another precision.
            "precision": "float32",
            "remat": "none",
            "unroll": "auto",
        },
        # mae_coef decides whether there is a mask token.
        "diffusion": {
            "sigma_data": 0.5,
            "mae_coef": 0.1 if has_mask_token else 0.0,
            **beside.get("diffusion", {}),
        },
        "data": {"space": "latents", "latent_scale": 0.18215, **beside.get("data", {})},
        "sampling": sampling | beside.get("sampling", {}),
    }
    try:
        return saved_config(sections)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _describe(options: dict[str, Any]) -> str:
    side, classes = options["image_size"], options["num_classes"]
    return (
        f"{model_name(options)}, {side}×{side}×{options['channels']}, "
        f"{counted(classes, 'class', 'classes') if classes else 'unconditional'}, "
        f"{'with' if options['use_mask_token'] else 'without'} mask token"
    )


def _check_position_tables(
    arrays: dict[str, np.ndarray], params: Params, options: dict[str, Any], where: str, tolerance: float
) -> None:
    """The tables are not kept, so those in the file must be the ones the network computes."""
    tables = to_torch(params, image_size=options["image_size"], patch_size=options["patch_size"])
    for key in (key for key in tables if key.endswith("pos_embed")):
        error = np.abs(arrays[key] - tables[key]).max()
        if not error <= tolerance:
            raise UserError(
                f"{where}: {key} is not the fixed sine-cosine table: it differs by up to {error:.3g}; "
                "learned positions are not supported"
            )


def _read_config(path: Path) -> dict[str, Any]:
    """What the `config.json` beside an exported file says; empty when there is none, or it is another's."""
    file = path.parent / CONFIG
    if not file.is_file():
        return {}
    content = read_json(file)
    if content.get("file") != path.name:
        return {}
    step, weights = content.get("step"), content.get("weights")
    if type(step) is not int or not 0 <= step < 2**31:  # what the counter of steps can hold
        raise UserError(
            f"{file} is damaged: step={shown(step)}, expected a whole number: mend it or move it away"
        )
    try:
        config = saved_config(content.get("config"))
    except UserError as error:
        raise UserError(f"{file} is damaged: {error}: mend it or move it away") from None
    sections = SAVED_WITH_WEIGHTS | {"model": dict.fromkeys(("num_heads", "decoder_num_heads"), int)}
    found = {section: {name: config[section][name] for name in names} for section, names in sections.items()}
    return found | {"step": step, "weights": weights if weights in tuple(WEIGHTS) else "ema"}


def export_torch(model: "Model", path: str | Path) -> None:
    """Write a model's weights for PyTorch, with a `MODEL_CARD.md` and a `config.json` beside them.

    A .safetensors file holds the weights of `model`; a .pt file both the raw weights ("model") and
    the EMA ("ema") of the same step of its run, loadable with strict key checking by code that builds
    the architecture under the authors' names. What was written is read back and compared.

    Raises:
      UserError: unknown format, a file is in the way, or the run's step is no longer there.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise UserError(f"{path}: expected a name that ends with .safetensors or .pt")
    if model.origin is None:
        raise UserError("this model was not loaded from a folder: export needs to know its step and weights")
    for file in (path, path.parent / CONFIG, path.parent / CARD):
        if file.exists():
            raise UserError(f"{file} exists already: an export needs a folder of its own, or remove it")
    if path.suffix == ".pt":
        sets = {name: _tensors(model.with_weights(ours)) for name, ours in PICKLED_SETS.items()}
    else:
        sets = {model.origin.weights: _tensors(model)}
    about = {
        "file": path.name,
        "format": "maskdit_jax",
        "model": model_name(model.config.model),
        "weights": model.origin.weights if len(sets) == 1 else "both",
        "step": model.origin.step,
        "config": model.config.to_dict(),
    }
    tensors = next(iter(sets.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        card, config = (stack.enter_context(appears_whole(path.parent / name)) for name in (CARD, CONFIG))
        card.write_text(model_card(about, tensors))
        config.write_text(json.dumps(about, indent=1))
        write_file(path, sets)
    weights = WEIGHTS_IN_WORDS[about["weights"]]
    log.info(
        f"exported {about['model']} ({weights}) of step {about['step']:,} to {path}: "
        f"{sum(x.size for x in tensors.values()):,} values, read back and compared"
    )


def _tensors(model: "Model") -> dict[str, np.ndarray]:
    m = model.config.model
    return to_torch(jax.device_get(model.params), image_size=m.image_size, patch_size=m.patch_size)
