"""Arrays in the .npz files of strangers: nothing is unpickled, and no size that a file claims is believed."""

import functools
import io
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from maskdit_jax.errors import UserError, first_line, shown
from maskdit_jax.interop.pickles import count_members

# A .npy begins with its header; numpy's own limit is on what it would evaluate, not on what it reads.
MAX_HEADER_BYTES = 10_000
# Compression of a member beyond which it is no data, but a bomb; what is small may be all zeros.
MAX_RATIO, SMALL = 100, 2**24
BATCH_BYTES = 2**28
_PART = 2**18  # zipfile's own reads take time by the square of their size


class Member(NamedTuple):
    """What the header of an array says; `start`: where in its member its values begin."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int


class Npz:
    """An open .npz file: `members`, its arrays by name, of which only the headers are read at first.

    Raises:
      UserError: no such file, damaged, or it holds more than plain arrays in C order.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():  # a pipe would let us wait for ever
            raise UserError(f"{path}: {'not a file' if self.path.exists() else 'no such file'}")
        self.members: dict[str, Member] = {}
        self._guarded(self._read_headers)

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def member(self, name: str) -> Member:
        """Shape and type of an array.

        Raises:
          UserError: there is none of this name.
        """
        if name not in self.members:
            there = ", ".join(shown(other) for other in list(self.members)[:5])
            raise UserError(f"{self.path} has no array {name}, only {there or 'other things'}")
        return self.members[name]

    def read(self, name: str) -> np.ndarray:
        """One array, whole.

        Raises:
          UserError: there is none of this name, or the file is damaged.
        """
        member = self.member(name)
        with self._archive.open(f"{name}.npy") as file:
            file.read(member.start)
            return self._guarded(lambda: _fill(file, member.shape, member.dtype))

    def batches(self, name: str, batch_size: int, count: int | None = None) -> Iterator[np.ndarray]:
        """The items of an array, or the first `count`, at most `batch_size` and BATCH_BYTES at a time.

        Raises:
          UserError: there is none of this name, or, when that is reached, the file is damaged.
        """
        shape, dtype, header_bytes = self.member(name)
        item_bytes = math.prod(shape[1:]) * dtype.itemsize
        count, at_once = shape[0] if count is None else count, BATCH_BYTES // max(item_bytes, 1)
        at_once = max(min(batch_size, at_once), 1)
        with self._archive.open(f"{name}.npy") as file:
            file.read(header_bytes)
            for start in range(0, count, at_once):
                part = (min(at_once, count - start), *shape[1:])
                yield self._guarded(functools.partial(_fill, file, part, dtype))

    def _guarded(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # of a damaged archive anything can come
            raise UserError(f"{self.path} is damaged or no .npz file: {first_line(error, 150)}") from error

    def _read_headers(self) -> None:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            count = count_members(file, size)
        self._archive = zipfile.ZipFile(self.path)
        infos = self._archive.infolist()
        if len({info.filename for info in infos}) != count:
            raise ValueError("a directory that can be read in several ways")
        self._check_claims(infos, size)
        for info in infos:
            if info.filename.endswith(".npy"):
                self._read_header(info)

    def _check_claims(self, infos: list[zipfile.ZipInfo], size: int) -> None:
        claimed = sum(info.compress_size for info in infos)
        if claimed > size:
            raise UserError(f"{self.path} claims {claimed:,} bytes of content, but has {size:,}")
        for info in infos:
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{self.path}: {shown(info.filename)} is compressed as numpy writes none")
            if info.file_size > max(MAX_RATIO * info.compress_size, SMALL):
                raise UserError(
                    f"{self.path}: {shown(info.filename)} claims to be {info.file_size:,} bytes in "
                    f"{info.compress_size:,}: a decompression bomb?"
                )

    def _read_header(self, info: zipfile.ZipInfo) -> None:
        where, name = f"{self.path}: {shown(info.filename)}", info.filename.removesuffix(".npy")
        with self._archive.open(info) as file:
            start = io.BytesIO(file.read(MAX_HEADER_BYTES + 12))
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        version = np.lib.format.read_magic(start)
        if version not in readers:
            raise UserError(f"{where} is of version {version} of numpy's format, expected 1.0 or 2.0")
        shape, is_fortran, dtype = readers[version](start, max_header_size=MAX_HEADER_BYTES)
        if dtype.hasobject or dtype.fields or dtype.subdtype:
            raise UserError(f"{where} holds {shown(str(dtype))}, expected numbers or a text")
        if is_fortran and len(shape) > 1:
            raise UserError(f"{where} is in Fortran's order, expected C's: np.ascontiguousarray makes it so")
        expected, found = math.prod(shape) * dtype.itemsize, info.file_size - start.tell()
        if min(shape, default=0) < 0 or expected != found:
            raise UserError(f"{where} says it is {shown(str(shape))} of {dtype}, but has {found:,} bytes")
        self.members[name] = Member(shape, dtype, start.tell())


def _fill(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The next values of a member, a little at a time, so that a large array is in memory once."""
    content = bytearray(math.prod(shape) * dtype.itemsize)
    done = 0
    while done < len(content):
        part = file.read(min(len(content) - done, _PART))
        if not part:
            raise EOFError("it ends early")
        content[done : done + len(part)] = part
        done += len(part)
    return np.frombuffer(content, dtype).reshape(shape)
