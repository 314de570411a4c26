"""Tensors in the files of the PyTorch world: .safetensors, and .pt read as plain tensors only.

Nothing in a file is ever run. What does not fit is refused with its names before anything is written.
"""

import argparse
import json
import math
import pickle
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskdit_jax.errors import UserError, first_line, shown
from maskdit_jax.files import appears_whole
from maskdit_jax.interop.pickles import check_pickled
from maskdit_jax.interop.tables import Shapes
from maskdit_jax.log import log

PICKLED = (".pt", ".pth", ".ckpt", ".bin")
HALF_PRECISION = ("float16", "bfloat16")
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
INTEGERS = "int64"
# The format allows 100 MB, which as Python's lists are gigabytes; MaskDiT-XL/2 takes 44 kB.
_MAX_HEADER_BYTES = 4_000_000
_LISTED = 3

Tensors = Mapping[str, Any]


def read_file(path: Path) -> dict[Any, Any]:
    """What a file holds: its tensors by name, and in a .pt file whatever else plain data may be there.

    Raises:
      UserError: no such file, damaged, or a pickle of more than plain tensors and data.
    """
    if not path.is_file():  # a pipe would let us wait for ever
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLED:
        return _read_pickled(path)
    raise UserError(f"{path}: expected a file .safetensors or {', '.join(PICKLED)}")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors.numpy  # the core of the package runs without it

    dtypes = _read_dtypes(path)
    _refuse_dtypes([f"{n} ({shown(d)})" for n, d in dtypes.items() if d not in _SAFETENSORS_DTYPES], path)
    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:  # the library has its own, and lets others' through
        raise UserError(f"{path} is damaged or cut short: {first_line(error, 200)}") from error


def _read_dtypes(path: Path) -> dict[str, str]:
    """Types of the tensors, by name, of a .safetensors header. Of two with one name the library would take
    the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise UserError(f"{path}: {_listed('name', names)} there twice")
        return content

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(f"{path} is damaged or cut short: {size:,} bytes, with a header of {length:,}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its header cannot be read: {first_line(error, 100)}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} is damaged: its header cannot be read: it is no JSON object")
    header.pop("__metadata__", None)
    return {name: _dtype_in_header(name, entry, path) for name, entry in header.items()}


def _dtype_in_header(name: str, entry: Any, path: Path) -> str:
    if not isinstance(entry, dict):
        entry = {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    whole = all(isinstance(x, list) and all(type(n) is int and n >= 0 for n in x) for x in (shape, offsets))
    if not isinstance(dtype, str) or not whole:
        raise UserError(
            f"{path} is damaged: its header says of {shown(name)} dtype {shown(dtype)}, "
            f"shape {shown(shape)}, data_offsets {shown(offsets)}"
        )
    return dtype


def _read_pickled(path: Path) -> dict[Any, Any]:
    torch = _import_torch(path)
    is_archive = check_pickled(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # of a damaged pickle anything can come
        # What PyTorch advises against its own refusals is to switch them off: that is not passed on.
        says_how = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        said = "" if says_how else f": {first_line(error, 200)}"
        raise UserError(f"{path} is damaged or not a PyTorch file{said}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected tensors by name")
    return dict(dict.items(content))  # an OrderedDict's own `items` may be something of the file's


def _import_torch(path: Path):
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path}: this format needs PyTorch: pip install torch, or use .safetensors"
        ) from error
    return torch


def shapes_of(
    tensors: Mapping[Any, Any], where: str, num_bytes: int | None = None, *, integers: bool = False
) -> Shapes:
    """Shapes of tensors that are all float32, float16 or bfloat16, of torch or numpy; or int64, if allowed.

    Raises:
      UserError: something is no such tensor, is empty, or has no name, or together they claim more than the
        file's `num_bytes`.
    """
    nameless = [shown(name) for name in tensors if not isinstance(name, str)]
    if nameless:
        raise UserError(f"{where}: {_listed('key', nameless)} no text: expected tensors by name")
    other, claimed = [], 0
    for name, value in tensors.items():
        kind = _kind(value)
        if kind not in _SAFETENSORS_DTYPES.values() or (kind == INTEGERS and not integers):
            other.append(f"{name} ({shown(kind)})")
        else:
            claimed += math.prod(value.shape) * value.itemsize
    _refuse_dtypes(other, where)
    if num_bytes is not None and claimed > num_bytes:
        raise UserError(f"{where} claims {claimed:,} bytes of tensors, but has {num_bytes:,}")
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    # So no side of a shape is longer than the file, however little the tensor holds.
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:
        raise UserError(f"{where}: {_listed('tensor', empty)} empty")
    return shapes


def _kind(value: Any) -> str:
    """Such as "float32", for a tensor whose values can be read as they are; otherwise what it is instead."""
    if isinstance(value, np.ndarray):
        return str(value.dtype)
    torch = sys.modules.get("torch")  # who has no torch has no tensors of it
    if torch is None or not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.is_nested:
        return "nested"
    if value.layout != torch.strided:
        return str(value.layout)
    return "meta" if value.is_meta else str(value.dtype).removeprefix("torch.")


def check_integers(tensors: Tensors, fixed: Mapping[str, np.ndarray], where: str) -> None:
    """Nothing is int64 but what is a fixed table of that type.

    Raises:
      UserError: something else is; the message names it.
    """
    integers = [name for name, value in tensors.items() if _kind(value) == INTEGERS]
    wrong = [name for name in integers if name not in fixed or fixed[name].dtype != INTEGERS]
    _refuse_dtypes([f"{name} ({INTEGERS})" for name in wrong], where)


def _refuse_dtypes(names: list[str], where: Any) -> None:
    if names:
        raise UserError(
            f"{where}: {_listed('tensor', names)} neither float32 nor float16 nor bfloat16: not the weights "
            "of a network"
        )


def as_float32(tensors: Tensors, where: str) -> dict[str, np.ndarray]:
    """The same tensors as float32 arrays; says what was half precision, and warns of values not finite."""
    half = sorted({_kind(value) for value in tensors.values()} & set(HALF_PRECISION))
    if half:
        log.info(f"{where} is {' and '.join(half)}: taken as float32, no value changes")
    arrays = {name: _as_array(value) for name, value in tensors.items()}
    broken = [name for name, value in arrays.items() if not np.isfinite(value).all()]
    if broken:
        log.warning(f"warning: {where}: {_listed('tensor', broken)} not finite (NaN or infinite values)")
    return arrays


def _as_array(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return np.asarray(value, np.float32)
    # A view may have its sign yet to be changed, which numpy does not know of.
    return value.detach().resolve_neg().cpu().float().numpy()


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
    return ", ".join(shown(name, 90) for name in names[:_LISTED]) + (", …" if len(names) > _LISTED else "")


def _listed(noun: str, names: list[str]) -> str:
    many = len(names) > 1
    return f"{len(names)} {noun}{'s' if many else ''} ({_first(names)}) {'are' if many else 'is'}"


def write_file(path: Path, sets: dict[str, dict[str, np.ndarray]]) -> None:
    """Write tensors, float32 or int64, and read them back to compare every bit before the file gets its name.

    A .safetensors file holds the tensors of the only set; a .pt file the sets by their names.

    Raises:
      UserError: the file could not be written, or differs from what was to be in it.
    """
    # safetensors writes the memory of an array as it lies, so that a transposed view would be
    # scrambled; torch wants memory it may write to.
    sets = {
        name: {
            key: np.require(value, INTEGERS if value.dtype == INTEGERS else np.float32, ["C", "W"])
            for key, value in tensors.items()
        }
        for name, tensors in sets.items()
    }
    with appears_whole(path) as partial:
        try:
            if path.suffix == ".safetensors":
                from safetensors.numpy import save_file

                (tensors,) = sets.values()
                save_file(tensors, partial, metadata={"format": "pt"})
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
                back[key].dtype == x.dtype and np.array_equal(back[key].view(np.uint32), x.view(np.uint32))
                for key, x in tensors.items()
            )
            if not same:
                raise UserError(f"{path}: what was read back differs from what was written; check the disk")
