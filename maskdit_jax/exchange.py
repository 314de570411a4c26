"""Weights in and out: a PyTorch file → a folder that works like a run's, and a run → a PyTorch file."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import jax
import numpy as np

from maskdit_jax.api import load, other_weights
from maskdit_jax.config import ConfigDict, compute_of, method_of, sampling_section
from maskdit_jax.errors import UserError, shown
from maskdit_jax.files import appears_whole, read_json
from maskdit_jax.interop import Layout, layout_of
from maskdit_jax.interop.tables import Shapes
from maskdit_jax.interop.torch_io import (
    INTEGERS,
    Tensors,
    as_float32,
    check_integers,
    check_shapes,
    read_file,
    shapes_of,
    write_file,
)
from maskdit_jax.log import counted, log
from maskdit_jax.methods import METHODS
from maskdit_jax.methods.method import Shape, init_params
from maskdit_jax.model_card import WEIGHTS_IN_WORDS, model_card
from maskdit_jax.models.compute import Compute
from maskdit_jax.options import as_section
from maskdit_jax.sampling import Model
from maskdit_jax.saved_config import saved_config
from maskdit_jax.training.checkpoint import Checkpoints
from maskdit_jax.training.meta import WEIGHTS

CONFIG, CARD = "config.json", "MODEL_CARD.md"
# Names of the weights in a .pt file, as the authors' code writes and loads them, and ours.
PICKLED_SETS = {"model": "params", "ema": "ema"}


class _Found(NamedTuple):
    """What tensors were recognised as: the method's name, the table of names, options of network and data."""

    method: str
    layout: Layout
    network: Any
    data: Shape

    def __str__(self) -> str:
        side, channels, classes = self.data
        words = [
            self.layout.model_name(self.network),
            f"{side}×{side}×{channels}",
            counted(classes, "class", "classes") if classes else "unconditional",
            *self.layout.traits(self.network),
        ]
        return ", ".join(words)


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

    Names, shapes and fixed position tables must be exactly those of a network that maskdit_jax/interop
    has the names of; nothing is written otherwise. Every value is kept to the bit. A file without
    `config.json` of `export_torch` beside it is taken to be a published one: the method's defaults, and
    for a MaskDiT latents of scale 0.18215.

    Args:
      source: a .safetensors or .pt file, or the tensors by name, of torch or numpy. {"model": …,
        "ema": …} gives both the raw weights and their EMA; otherwise one set stands for both.
      out_dir: new folder.
      model, image_size, num_classes: what is expected, such as "MaskDiT-XL/2", 32 (of latents, or of
        images), 1000; read from the tensors, and compared with these where given.
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
    shapes = {
        name: shapes_of(tensors, places[name], num_bytes, integers=True) for name, tensors in sets.items()
    }
    found = _recognise(next(iter(shapes.values())), where)
    _compare_with_expected(found, where, model=model, image_size=image_size, num_classes=num_classes)
    heads = {"num_heads": num_heads, "decoder_num_heads": decoder_num_heads}
    saved = _config_beside(found, beside, where)
    found = found._replace(network=_with_heads(found, where, saved, heads))
    config = _config_of(found, saved, where)

    expected = _expected_shapes(config, found)
    for name, of_set in shapes.items():
        check_shapes(of_set, expected, places[name], str(found))
    params = {}
    for name, tensors in sets.items():
        check_integers(tensors, found.layout.fixed_tensors(found.network, found.data), places[name])
        arrays = as_float32(tensors, places[name])
        _check_fixed(arrays, tensors, found, places[name])
        params[WEIGHTS[name]] = found.layout.from_torch(arrays, found.network)

    step = beside.get("step", 0)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with appears_whole(out_dir) as partial:
        checkpoints = Checkpoints(partial, keep=1)
        checkpoints.save_weights(step, params, {"config": config.to_dict(), "imported_from": where})
        checkpoints.close()
    count = sum(x.size for x in jax.tree.leaves(next(iter(params.values()))))
    log.info(
        f"imported {where} to {out_dir}: {found}, {count:,} parameters, "
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


def _expected_shapes(config: ConfigDict, found: _Found) -> Shapes:
    def tensors():
        params = init_params(method_of(config), found.data, compute_of(config), 0)
        return found.layout.to_torch(params, found.network, found.data)

    return {name: tuple(x.shape) for name, x in jax.eval_shape(tensors).items()}


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


def _recognise(shapes: Shapes, where: str) -> _Found:
    """The network whose tensors have these shapes, its heads as far as its size tells them."""
    some = f"it has {', '.join(shown(name) for name in list(shapes)[:3])}, …"
    layouts = {name: layout for name in METHODS if (layout := layout_of(name)) is not None}
    name = next((name for name, layout in layouts.items() if layout.recognises(shapes)), None)
    if name is None:
        families = " or ".join(layout.FAMILY for layout in layouts.values())
        missing = " and no ".join(layout.PATCH_MAP for layout in layouts.values())
        raise UserError(f"{where} is no {families}: it has no {missing}; {some}")
    layout = layouts[name]
    try:
        options = layout.read_options(shapes)
    except KeyError as error:
        raise UserError(f"{where} is no {layout.FAMILY}: it has no {error.args[0]}; {some}") from None
    except ValueError as error:
        raise UserError(f"{where} is no {layout.FAMILY}: {error}") from None
    network = get_type_hints(METHODS[name])["network"]
    return _Found(name, layout, network(**options["network"]), Shape(**options["data"]))


def _compare_with_expected(found: _Found, where: str, **expected: Any) -> None:
    values = found.data._asdict() | {"model": found.layout.model_name(found.network)}
    differences = [
        f"{name}={value} expected, {values[name]} found"
        for name, value in expected.items()
        if value is not None and value != values[name]
    ]
    if differences:
        raise UserError(f"{where}: {'; '.join(differences)}")


def _config_beside(found: _Found, beside: dict[str, Any], where: str) -> dict[str, Any]:
    """Sections of the config.json beside a file, empty where there is none."""
    sections = beside.get("config", {"method": {"network": {}}, "data": {}, "sampling": {}})
    name = sections["method"].get("name", found.method)
    if name != found.method:
        raise UserError(
            f"{where} is a {found.layout.FAMILY}, but the {CONFIG} beside it says method.name={name}: mend "
            "it or move it away"
        )
    return sections


def _with_heads(found: _Found, where: str, saved: dict[str, Any], given: dict[str, int | None]) -> Any:
    """The network with its heads: those given, of the config.json, or of the published sizes.

    And with what else only the config.json tells.
    """
    published = found.layout.heads(found.network)
    values = {}
    for name, number in given.items():
        if name not in published and number is not None:
            raise UserError(f"{where}: {name}={number}: {found} has no such heads")
    for name, (usual, width) in published.items():
        value = given.get(name) or saved["method"]["network"].get(name) or usual
        if not value:
            raise UserError(
                f"{where}: {found} is no published size, and tensors do not tell {name}: give {name}, or put "
                f"the {CONFIG} of its export beside the file"
            )
        if not isinstance(value, int) or value < 1 or width % value:
            raise UserError(f"{where}: {name}={value} does not divide the width {width}")
        values[name] = value
    untold = {name: x for name, x in saved["method"]["network"].items() if name in found.layout.UNTOLD}
    return dataclasses.replace(found.network, **values, **untold)


def _config_of(found: _Found, saved: dict[str, Any], where: str) -> ConfigDict:
    """The part of a run's configuration that its weights need to be used."""
    kind, layout = METHODS[found.method], found.layout
    options = as_section(kind(network=found.network, **layout.method_options(found.network)))
    options |= {name: value for name, value in saved["method"].items() if name != "network"}
    data = {name: saved["data"][name] for name in layout.PUBLISHED_DATA if name in saved["data"]}
    sections = {
        "method": {"name": found.method} | options,
        "data": found.data._asdict() | layout.PUBLISHED_DATA | data,
        # Parity first; `load` and `sample` take another precision.
        "compute": as_section(Compute(precision="float32")),
        "sampling": sampling_section(kind.sampler) | saved["sampling"],
    }
    try:
        return saved_config(sections)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_fixed(arrays: dict[str, np.ndarray], tensors: Tensors, found: _Found, where: str) -> None:
    """Tables that are no parameters are not kept, so those in the file must be what the network computes."""
    for key, table in found.layout.fixed_tensors(found.network, found.data).items():
        tolerance = 2**-8 if str(tensors[key].dtype).endswith("float16") else 1e-6
        error = np.abs(arrays[key] - table).max()
        if not error <= tolerance:
            kind = "index" if table.dtype == INTEGERS else "sine-cosine"
            note = "" if table.dtype == INTEGERS else "; learned positions are not supported"
            raise UserError(
                f"{where}: {key} is not the fixed {kind} table: it differs by up to {error:.3g}{note}"
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
    weights = weights if weights in tuple(WEIGHTS) else "ema"
    return {"config": config.to_dict(), "step": step, "weights": weights}


def export_torch(model: Model | str | Path, path: str | Path) -> None:
    """Write weights for PyTorch, with a `MODEL_CARD.md` and a `config.json` beside them.

    Those of a model, or the EMA of the newest checkpoint in the folder of a run or import.
    A .safetensors file holds the weights of `model`; a .pt file both the raw weights ("model") and
    the EMA ("ema") of the same step of its run, loadable with strict key checking by code that builds
    the architecture under the authors' names. What was written is read back and compared.

    Raises:
      UserError: unknown format, a file is in the way, the run's step is no longer there, or the names of
        the method's tensors are not known.
    """
    path = Path(path)
    if not isinstance(model, Model):
        model = load(model, vae="")
    if path.suffix not in (".safetensors", ".pt"):
        raise UserError(f"{path}: expected a name that ends with .safetensors or .pt")
    if model.origin is None:
        raise UserError("this model was not loaded from a folder: export needs to know its step and weights")
    name = model.config.method.name
    layout = layout_of(name)
    if layout is None:
        raise UserError(
            f"method {name} has no table of PyTorch names in maskdit_jax/interop: nothing is exported"
        )
    for file in (path, path.parent / CONFIG, path.parent / CARD):
        if file.exists():
            raise UserError(f"{file} exists already: an export needs a folder of its own, or remove it")
    if path.suffix == ".pt":
        sets = {name: _tensors(other_weights(model, ours), layout) for name, ours in PICKLED_SETS.items()}
    else:
        sets = {model.origin.weights: _tensors(model, layout)}
    about = {
        "file": path.name,
        "format": "maskdit_jax",
        "model": layout.model_name(model.method.network),
        "weights": model.origin.weights if len(sets) == 1 else "both",
        "step": model.origin.step,
        "config": model.config.to_dict(),
    }
    tensors = next(iter(sets.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        card, config = (stack.enter_context(appears_whole(path.parent / name)) for name in (CARD, CONFIG))
        card.write_text(model_card(about, tensors, model, layout))
        config.write_text(json.dumps(about, indent=1))
        write_file(path, sets)
    weights = WEIGHTS_IN_WORDS[about["weights"]]
    log.info(
        f"exported {about['model']} ({weights}) of step {about['step']:,} to {path}: "
        f"{sum(x.size for x in tensors.values()):,} values, read back and compared"
    )


def _tensors(model: Model, layout: Layout) -> dict[str, np.ndarray]:
    return layout.to_torch(jax.device_get(model.params), model.method.network, model.shape)
