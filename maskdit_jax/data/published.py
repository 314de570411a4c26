"""The caches of latents that others publish, LMDB or webdataset tars, as numbered items.

Both kinds hold items 0 … n-1, each the moments [8, H, W] float32 of one encoded image, channels 0-3
mean and 4-7 log-variance, unscaled, and its class; the second half of the items are, as published, the
encodings of the mirrored images of the first half, in the same order.
"""

import array
import contextlib
import functools
import io
import math
import pickle
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskdit_jax.errors import UserError
from maskdit_jax.log import log

CHANNELS = 8  # four means, four log-variances


class Items(NamedTuple):
    """labels [n] int64; read(i): moments [8, H, H] float32 of item i; where(i): file and item, for errors."""

    labels: np.ndarray
    read: Callable[[int], np.ndarray]
    where: Callable[[int], str]


def _number(text: bytes | None, where: str) -> int:
    if text is None:
        raise UserError(f"{where} is missing")
    if not re.fullmatch(rb"\s*\d{1,12}\s*", text):
        raise UserError(f"{where} is {text[:40]!r}, expected a number")
    return int(text)


def _side(size: int) -> int:
    """H such that [8, H, H] float32 takes `size` bytes; 0 when there is none."""
    side = math.isqrt(size // (4 * CHANNELS))
    return side if size == 4 * CHANNELS * side**2 else 0


@contextlib.contextmanager
def _lmdb_items(folder: Path) -> Iterator[Items]:
    """Items of an LMDB: z-I the moments as bytes, y-I the class as text, `length` how many, flips included.

    Every key is looked up before the first item is read. The items can be read inside the context only.
    """
    try:
        import lmdb
    except ImportError as error:
        raise UserError("--format=lmdb needs the package lmdb: pip install lmdb") from error
    file = folder / "data.mdb"
    if not file.is_file():
        raise UserError(f"{file}: no such file; for --format=lmdb --input is {INPUTS['lmdb']}")
    try:
        with lmdb.open(str(folder), readonly=True, lock=False, readahead=False, subdir=True) as env:
            # Reading pages that the file does not have would end the process with a bus error.
            size, expected = file.stat().st_size, (env.info()["last_pgno"] + 1) * env.stat()["psize"]
            if size < expected:
                raise UserError(f"{file} is cut short: {size:,} of {expected:,} bytes")
            # As buffers, the values are not copied: looking at their size does not read them.
            with env.begin(buffers=True) as transaction:
                labels = _lmdb_labels(transaction, file)

                def read(number: int) -> np.ndarray:
                    values = np.frombuffer(transaction.get(b"z-%d" % number), "<f4")
                    side = _side(values.nbytes)
                    return values.reshape(CHANNELS, side, side)

                yield Items(labels, read, lambda number: f"{file}, item {number}")
    except lmdb.Error as error:
        raise UserError(f"{file} is damaged or not an LMDB: {error}") from error


def _lmdb_labels(transaction: Any, file: Path) -> np.ndarray:
    """Labels [n] of an LMDB in which every item is there and of the same size, and nothing else is."""

    def get(key: bytes) -> Any:
        value = transaction.get(key)
        if value is None:
            raise UserError(f"{file}: {key.decode()} is missing")
        return value

    length = _number(bytes(get(b"length")), f"{file}: length")
    labels, first = array.array("q"), None
    for i in range(length):
        size = len(get(b"z-%d" % i))
        if not _side(size):
            raise UserError(f"{file}: z-{i} is {size:,} bytes, which are no [8, H, H] float32")
        first = first or size
        if size != first:
            raise UserError(f"{file}: z-{i} is {size:,} bytes, but z-0 is {first:,}")
        labels.append(_number(bytes(get(b"y-%d" % i)), f"{file}: y-{i}"))
    entries, expected = transaction.stat()["entries"], 2 * length + 1
    if entries != expected:
        raise UserError(f"{file} has {entries:,} keys, but length={length} makes {expected:,}: it holds more")
    log.info(f"{file}: {length:,} items")
    return np.array(labels, np.int64)


@contextlib.contextmanager
def _webdataset_items(folder: Path) -> Iterator[Items]:
    """Items of a folder of tars with members 0000000.cls, text, and 0000000.latent, a pickle, and so on.

    The headers of all tars are read first, then each latent from its place; nothing is unpacked to disk.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder} holds no .tar; for --format=webdataset --input is {INPUTS['webdataset']}")
    scans = [_scan(tar) for tar in tars]
    log.info(f"{folder}: {sum(len(classes) for classes, _ in scans):,} items in {len(tars):,} tars")
    classes, latents = (_in_order(tables, kind, tars) for kind, tables in zip(KINDS, zip(*scans)))
    if len(classes) != len(latents):
        kind = KINDS[len(latents) < len(classes)]
        raise UserError(f"{folder}: {min(len(classes), len(latents)):07d}.{kind} is missing")

    def where(number: int) -> str:
        return f"{tars[latents[number, 0]]}, item {number:07d}"

    def read(number: int) -> np.ndarray:
        tar, _, offset, size = latents[number].tolist()
        try:
            with tars[tar].open("rb", buffering=0) as file:
                file.seek(offset)
                pickled = file.read(size)
        except OSError as error:
            raise UserError(f"{where(number)} could not be read: {error}") from error
        return _unpickle(pickled, where(number))

    yield Items(classes[:, 2], read, where)


KINDS = ("cls", "latent")
READERS = {"lmdb": _lmdb_items, "webdataset": _webdataset_items}
INPUTS = {"lmdb": "the folder that holds data.mdb", "webdataset": "the folder that holds the .tar files"}


def _scan(tar: Path) -> tuple[np.ndarray, np.ndarray]:
    """What a tar lists: classes [a, (number, class)] and latents [b, (number, offset, size)], int64."""
    classes, latents = array.array("q"), array.array("q")
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as members:
            while (member := members.next()) is not None:
                members.members.clear()  # where tarfile keeps every header it has read
                name = re.fullmatch(r"([0-9]{1,12})\.(cls|latent)", member.name)
                if not name or not member.isreg() or member.issparse() or member.size < 0:
                    raise UserError(f"{tar}: {member.name!r} is no member NNNNNNN.cls or NNNNNNN.latent")
                if name[2] == "latent":
                    latents.extend((int(name[1]), member.offset_data, member.size))
                    continue
                file.seek(member.offset_data)
                label = _number(file.read(min(member.size, 40)), f"{tar}: {member.name}")
                classes.extend((int(name[1]), label))
            # tarfile takes a header it cannot read for the end. The end is zeros, and nothing follows it.
            file.seek(members.offset)
            rest = file.read(2**20)
            if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
                raise UserError(f"{tar} is cut short or damaged at byte {members.offset:,}")
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{tar} is cut short, damaged or not a plain tar: {error!r}") from error
    return np.array(classes, np.int64).reshape(-1, 2), np.array(latents, np.int64).reshape(-1, 3)


def _in_order(tables: tuple[np.ndarray, ...], kind: str, tars: list[Path]) -> np.ndarray:
    """The tars' tables [n, (number, …)] as one [n, (tar, number, …)] by number, which must be 0 … n-1."""
    table = np.concatenate([np.insert(rows, 0, i, axis=1) for i, rows in enumerate(tables)])
    table = table[np.argsort(table[:, 1], kind="stable")]
    numbers = table[:, 1]
    wrong = np.flatnonzero(numbers != np.arange(len(numbers)))
    if wrong.size:
        # Up to here they are 0 … i-1, so the next is i-1 once more, or i is left out.
        i = int(wrong[0])
        if numbers[i] > i:
            raise UserError(f"{tars[0].parent}: {i:07d}.{kind} is missing")
        first, second = (tars[tar].name for tar in table[i - 1 : i + 1, 0])
        raise UserError(f"{tars[0].parent}: {i - 1:07d}.{kind} is there twice, in {first} and in {second}")
    return table


class _Said:
    """Stands for an array or dtype in a pickle: keeps what the pickle says about it, and does nothing."""

    def __init__(self, *said: Any):
        self.said = said

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ArraysOnly(pickle.Unpickler):
    """Loads what describes a numpy array, by numpy 1 or 2, and refuses every other name.

    numpy's own functions are not called: a dtype's state is taken unchecked there, and can make it read
    memory that is none of the array's.
    """

    MODULES = re.compile(r"numpy|numpy\._?core\.(multiarray|numeric)")
    NAMES = ("_reconstruct", "_frombuffer", "ndarray", "dtype")

    def __init__(self, pickled: bytes, where: str):
        super().__init__(io.BytesIO(pickled))
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.NAMES or not self.MODULES.fullmatch(module):
            what = repr(f"{module}.{name}"[:80])
            raise UserError(f"{self.where}: its pickle would load {what}, which no array needs")
        return functools.partial(_Said, name)


def _unpickle(pickled: bytes, where: str) -> np.ndarray:
    """Moments [8, H, H] float32 from the pickle of such an array, running nothing that it names.

    Raises:
      UserError: it is something else; the message begins with `where`.
    """
    try:
        return _array(_ArraysOnly(pickled, where).load(), where)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{where}: its pickle is damaged: {error!r:.200}") from error


def _array(said: Any, where: str) -> np.ndarray:
    """The moments [8, H, H] float32 that a pickle describes."""
    match said:
        case _Said(said=("_reconstruct", *_), state=(_, shape, dtype, fortran, data)):
            order = "F" if fortran else "C"
        case _Said(said=("_frombuffer", data, dtype, shape, ("C" | "F") as order)):
            pass
        case _:
            raise UserError(f"{where}: its pickle is no array")
    match dtype:
        case _Said(said=("dtype", "f4", *_), state=(_, "<", *_)):
            pass
        case _Said(said=("dtype", str(kind), *_)):
            raise UserError(
                f"{where}: an array of dtype {kind[:80]!r}, expected little-endian float32 ('f4')"
            )
        case _:
            raise UserError(f"{where}: an array of no dtype, expected float32")
    side = _side(len(data)) if isinstance(data, bytes | bytearray) else 0
    if not side or shape != (CHANNELS, side, side):
        raise UserError(f"{where}: an array {shape!r:.80}, expected ({CHANNELS}, H, H) with its values")
    return np.frombuffer(data, "<f4").reshape(shape, order=order)
