"""Published latents as webdataset tars: members 0000000.cls, text, 0000000.latent, a pickle, and so on."""

import array
import contextlib
import functools
import io
import os
import pickle
import pickletools
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maskdit_jax.data.items import CHANNELS, MAX_ITEM_BYTES, Items, number, side_of
from maskdit_jax.errors import UserError, first_line, printable
from maskdit_jax.log import counted, log

INPUT = "the folder that holds the .tar files"
# All headers of a member together: one block, with pax attributes three or four. tarfile takes a time
# that grows with the square of their length.
MAX_HEADER_BYTES = 4096
HASHING = ("SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET")
MAX_MEMO = 1000  # a pickled array has about ten entries


@contextlib.contextmanager
def tar_items(folder: Path) -> Iterator[Items]:
    """Items of a folder of tars.

    The headers of all tars are read first, then each latent from its place; nothing is unpacked to disk.

    Raises:
      UserError: an item is missing, twice or not what it should be, or a tar is damaged.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder} holds no .tar; for --format=webdataset --input is {INPUT}")
    scanned_classes, scanned_latents = zip(*map(_scan, tars), strict=True)
    classes, latents = _in_order(scanned_classes, "cls", tars), _in_order(scanned_latents, "latent", tars)
    log.info(f"{printable(folder)}: {counted(len(classes), 'item')} in {counted(len(tars), 'tar')}")
    if len(classes) != len(latents):
        kind = "cls" if len(classes) < len(latents) else "latent"
        raise UserError(f"{folder}: {min(len(classes), len(latents)):07d}.{kind} is missing")

    def where(item: int) -> str:
        return f"{tars[latents[item, 0]]}, item {item:07d}"

    def read(items: np.ndarray) -> Iterator[np.ndarray]:
        for item in items.tolist():
            tar, _, offset, size = latents[item].tolist()
            try:
                with tars[tar].open("rb", buffering=0) as file:
                    file.seek(offset)
                    pickled = file.read(size)
            except OSError as error:
                raise UserError(f"{where(item)} could not be read: {error}") from error
            yield _unpickle(pickled, where(item))

    yield Items(classes[:, 2], read, where)


class _Headers(io.FileIO):
    """A tar of which tarfile reads the headers: as many bytes as a header claims, however many that are.

    `left`: how many it may still read for the next member.
    """

    left = MAX_HEADER_BYTES

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= self.left:
            raise UserError(
                f"{os.fsdecode(self.name)} is damaged: the header that ends at byte {self.tell():,} "
                f"claims {size:,} bytes of names and attributes, expected at most {MAX_HEADER_BYTES:,}"
            )
        self.left -= size
        return super().read(size)


class _Tar(tarfile.TarFile):
    members: list[tarfile.TarInfo]  # where it keeps every header it has read
    pax_headers: dict[str, str]  # and here every attribute of all members


def _scan(tar: Path) -> tuple[np.ndarray, np.ndarray]:
    """What a tar lists: classes [a, (number, class)] and latents [b, (number, offset, size)], int64."""
    if not tar.is_file():  # a pipe would let us wait for ever
        raise UserError(f"{tar} is not a file")
    classes, latents, last = array.array("q"), array.array("q"), -1
    try:
        with _Headers(tar) as file, _Tar.open(fileobj=file, mode="r:") as opened:
            while (member := opened.next()) is not None:
                opened.members.clear()
                opened.pax_headers.clear()
                file.left = MAX_HEADER_BYTES
                name = re.fullmatch(r"([0-9]{1,12})\.(cls|latent)", member.name)
                if not name or not member.isreg() or member.issparse() or opened.offset <= last:
                    raise UserError(f"{tar}: {member.name[:80]!r} is no member NNNNNNN.cls or NNNNNNN.latent")
                if not 0 <= member.size <= MAX_ITEM_BYTES:
                    raise UserError(
                        f"{tar} is damaged: {member.name} claims {member.size:,} bytes, expected "
                        f"at most {MAX_ITEM_BYTES:,}"
                    )
                last = opened.offset
                if name[2] == "latent":
                    latents.extend((int(name[1]), member.offset_data, member.size))
                    continue
                text = os.pread(file.fileno(), min(member.size, 40), member.offset_data)
                classes.extend((int(name[1]), number(text, f"{tar}: {member.name}")))
            # tarfile takes a header it cannot read for the end. The end is zeros, and nothing follows it.
            rest = os.pread(file.fileno(), 2**20, opened.offset)
            if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
                raise UserError(f"{tar} is cut short or damaged at byte {opened.offset:,}")
    except UserError:
        raise
    except Exception as error:  # a damaged header can make tarfile fail in any way
        raise UserError(
            f"{tar} is cut short, damaged or not a plain tar: {first_line(error, 120)}"
        ) from error
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
        for opcode, argument, _ in pickletools.genops(pickled):
            # Hashing a tuple that holds itself over and over takes for ever; a place in the memo takes
            # memory for all places before it.
            if opcode.name in HASHING or (
                opcode.name.endswith("PUT") and isinstance(argument, int) and argument > MAX_MEMO
            ):
                raise UserError(f"{where}: its pickle has {opcode.name}, which no array needs")
        return _array(_ArraysOnly(pickled, where).load(), where)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{where}: its pickle is damaged: {first_line(error, 200)}") from error


def _array(said: Any, where: str) -> np.ndarray:
    """The moments [8, H, H] float32 that a pickle describes."""
    order: Literal["C", "F"]
    match said:
        case _Said(said=("_reconstruct", *_), state=(_, shape, dtype, fortran, data)):
            order = "F" if fortran else "C"
        case _Said(said=("_frombuffer", data, dtype, shape, ("C" | "F") as named)):
            order = "F" if named == "F" else "C"
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
    side = side_of(len(data)) if isinstance(data, bytes | bytearray) else 0
    if not side or shape != (CHANNELS, side, side):
        # Written out only where it is short: a tuple can hold itself over and over.
        plain = isinstance(shape, tuple) and len(shape) < 9 and all(type(n) is int for n in shape)
        found = f"an array {shape!r:.80}" if plain else "an array of no shape"
        raise UserError(f"{where}: {found}, expected ({CHANNELS}, H, H) with its values")
    return np.frombuffer(data, "<f4").reshape((CHANNELS, side, side), order=order)
