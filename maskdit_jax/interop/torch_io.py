"""Tensors in the files of the PyTorch world: .safetensors, and .pt read as plain tensors only.

Nothing in a file is ever run. What does not fit is refused with its names before anything is written.
"""

import argparse
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskdit_jax.errors import UserError, first_line
from maskdit_jax.files import appears_whole
from maskdit_jax.interop.names import Shapes
from maskdit_jax.log import log

PICKLED = (".pt", ".pth", ".ckpt", ".bin")
HALF_PRECISION = ("float16", "bfloat16")
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LISTED = 10

Tensors = Mapping[str, Any]


def read_file(path: Path) -> dict[str, Any]:
    """What a file holds: its tensors by name, and in a .pt file whatever else plain data may be there.

    Raises:
      UserError: no such file, damaged, or a pickle of more than plain tensors and data.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLED:
        return _read_pickled(path)
    raise UserError(f"{path}: expected a file .safetensors or {', '.join(PICKLED)}")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors.numpy  # the core of the package runs without it

    header = _read_header(path)
    other = [
        f"{name} ({entry['dtype']})"
        for name, entry in header.items()
        if entry["dtype"] not in _SAFETENSORS_DTYPES
    ]
    _refuse_dtypes(other, path)
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from error


def _read_header(path: Path) -> dict[str, dict]:
    """Entries of a .safetensors header. Of two with one name the library would take the last."""

    def unique(pairs):
        names = [name for name, _ in pairs]
        twice = (
            sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        )
        if twice:
            raise UserError(f"{path}: {_listed('tensor', twice)} there twice")
        return dict(pairs)

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(path.stat().st_size - 8, _MAX_HEADER_BYTES):
            raise UserError(
                f"{path} is damaged or cut short: {path.stat().st_size:,} bytes, with a header of {length:,}"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique)
        return {name: {"dtype": entry["dtype"]} for name, entry in header.items() if name != "__metadata__"}
    except (
        UnicodeDecodeError,
        json.JSONDecodeError,
        RecursionError,
        AttributeError,
        KeyError,
        TypeError,
    ) as error:
        raise UserError(f"{path} is damaged: its header cannot be read ({error!r})") from error


def _read_pickled(path: Path) -> dict[str, Any]:
    torch = _import_torch(path)
    try:
        # A Namespace, in which training scripts keep their flags, only carries attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of a damaged pickle anything can come
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path}: refused, it is more than plain tensors: reading it would call {refused[1]}. "
                "Nothing was run. Ask its author for .safetensors, or, if you trust the file, load it with "
                "torch and save its tensors alone"
            ) from None
        raise UserError(f"{path} is damaged or not a PyTorch file: {first_line(error, 200)}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, expected tensors by name")
    return dict(content)


def _import_torch(path: Path):
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path}: this format needs PyTorch: pip install 'maskdit_jax[torch]', or use .safetensors"
        ) from error
    return torch


def shapes_of(tensors: Tensors, where: str, num_bytes: int | None = None) -> Shapes:
    """Shapes of tensors that are all float32, float16 or bfloat16, of torch or numpy.

    Raises:
      UserError: something is no such tensor, or together they claim more than the file's `num_bytes`.
    """
    other, claimed = [], 0
    for name, value in tensors.items():
        kind = _dtype(value)
        if kind not in _SAFETENSORS_DTYPES.values():
            other.append(f"{name} ({kind})")
        else:
            claimed += int(np.prod(value.shape, dtype=np.float64)) * (2 if kind in HALF_PRECISION else 4)
    _refuse_dtypes(other, where)
    if num_bytes is not None and claimed > num_bytes:
        raise UserError(f"{where} claims {claimed:,} bytes of tensors, but has {num_bytes:,}")
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _dtype(value: Any) -> str:
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        return type(value).__name__
    layout = str(getattr(value, "layout", "torch.strided"))
    return str(value.dtype).removeprefix("torch.") if layout == "torch.strided" else layout


def _refuse_dtypes(names: list[str], where: Any) -> None:
    if names:
        raise UserError(
            f"{where}: {_listed('tensor', names)} neither float32 nor float16 nor bfloat16: not the weights "
            "of a network"
        )


def as_float32(tensors: Tensors, where: str) -> dict[str, np.ndarray]:
    """The same tensors as float32 arrays; says what was half precision, and warns of values not finite."""
    half = sorted({_dtype(value) for value in tensors.values()} & set(HALF_PRECISION))
    if half:
        log.info(f"{where} is {' and '.join(half)}: taken as float32, no value changes")
    arrays = {}
    for name, value in tensors.items():
        is_torch = hasattr(value, "detach")
        arrays[name] = value.detach().cpu().float().numpy() if is_torch else np.asarray(value, np.float32)
    broken = [name for name, value in arrays.items() if not np.isfinite(value).all()]
    if broken:
        log.warning(f"warning: {where}: {_listed('tensor', broken)} not finite (NaN or infinite values)")
    return arrays


def check_shapes(found: Shapes, expected: Shapes, where: str, what: str) -> None:
    """Compare names and shapes.

    Raises:
      UserError: they differ; the message counts and names what is missing, unexpected and of another shape.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    other = [
        f"{name} {list(found[name])} instead of {list(expected[name])}"
        for name in expected
        if name in found and found[name] != tuple(expected[name])
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
    problems = [f"{len(names)} {kind}: {_first(names)}" for kind, names in kinds if names]
    if problems:
        raise UserError(f"{where} does not fit {what}: {'; '.join(problems)}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")


def _listed(noun: str, names: list[str]) -> str:
    many = len(names) > 1
    return f"{len(names)} {noun}{'s' if many else ''} ({_first(names)}) {'are' if many else 'is'}"


def write_file(path: Path, sets: dict[str, dict[str, np.ndarray]]) -> None:
    """Write float32 tensors, and read them back to compare every bit before the file gets its name.

    A .safetensors file holds the tensors of the only set; a .pt file the sets by their names.

    Raises:
      UserError: the file could not be written, or differs from what was to be in it.
    """
    # safetensors writes the memory of an array as it lies, so that a transposed view would be
    # scrambled; torch wants memory it may write to.
    sets = {
        name: {key: np.require(value, np.float32, ["C", "W"]) for key, value in tensors.items()}
        for name, tensors in sets.items()
    }
    with appears_whole(path) as partial:
        try:
            if path.suffix == ".safetensors":
                from safetensors.numpy import save_file

                (content,) = sets.values()
                save_file(content, partial, metadata={"format": "pt"})
                partial.chmod(0o644)  # the library writes files for their owner only
                written = {name: _read_safetensors(partial) for name in sets}
            else:
                torch = _import_torch(path)
                content = {n: {k: torch.from_numpy(v) for k, v in t.items()} for n, t in sets.items()}
                with partial.open("wb") as file:
                    torch.save(content, file)
                written = _read_pickled(partial)
        except UserError:
            raise
        except Exception as error:  # a full disk is another exception in each library
            raise UserError(f"{path} could not be written: {first_line(error)}") from error
        for name, tensors in sets.items():
            back = {key: np.asarray(value) for key, value in written[name].items()}
            same = back.keys() == tensors.keys() and all(
                np.array_equal(back[key].view(np.uint32), value.view(np.uint32))
                for key, value in tensors.items()
            )
            if not same:
                raise UserError(f"{path}: what was read back differs from what was written; check the disk")
