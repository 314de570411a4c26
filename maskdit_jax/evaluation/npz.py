"""Arrays in the .npz files of strangers: nothing is unpickled, and no size that a file claims is believed."""

import io
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from maskdit_jax.errors import UserError, first_line, shown
from maskdit_jax.interop.pickles import count_members

# A .npy begins with its header; numpy's own limit is on what it would evaluate, not on what it reads.
MAX_HEADER_BYTES = 10_000
# Compression of a member beyond which it is no data, but a bomb; what is small may be all zeros.
MAX_RATIO, SMALL = 100, 2**24
BATCH_BYTES = 2**28


class Member(NamedTuple):
    """An array in a file; `start`: where in its member its values begin."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int


class Npz:
    """A .npz file: `members`, its arrays by name, of which only the headers are read at first.

    Raises:
      UserError: no such file, damaged, or it holds more than plain arrays in C order.
    """

    def __init__(self, path: Path):
        if not path.is_file():  # a pipe would let us wait for ever
            raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        self.path = path
        self.members = self._guarded(self._read_headers)

    def read(self, name: str) -> np.ndarray:
        """One array, whole.

        Raises:
          UserError: there is none of this name, or the file is damaged.
        """
        member = self._member(name)

        def read() -> np.ndarray:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as values:
                values.read(member.start)
                return _read_rows(values, member.shape, member.dtype)

        return self._guarded(read)

    def batches(self, name: str, batch_size: int, count: int) -> Iterator[np.ndarray]:
        """The first `count` items of an array, at most `batch_size` and BATCH_BYTES of them at a time.

        Raises:
          UserError: there is none of this name, or, when that is reached, the file is damaged.
        """
        member = self._member(name)
        item_bytes = math.prod(member.shape[1:]) * member.dtype.itemsize
        at_once = max(min(batch_size, BATCH_BYTES // max(item_bytes, 1)), 1)
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as values:
            values.read(member.start)
            for start in range(0, count, at_once):
                shape = (min(at_once, count - start), *member.shape[1:])
                yield self._guarded(lambda shape=shape: _read_rows(values, shape, member.dtype))

    def _member(self, name: str) -> Member:
        if name not in self.members:
            there = ", ".join(shown(other) for other in list(self.members)[:5])
            raise UserError(f"{self.path} has no array {name}, only {there}")
        return self.members[name]

    def _guarded(self, read):
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # of a damaged archive anything can come
            raise UserError(f"{self.path} is damaged or no .npz file: {first_line(error, 150)}") from error

    def _read_headers(self) -> dict[str, Member]:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            count = count_members(file, size)
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                names = [info.filename for info in infos]
                if len(set(names)) != count:
                    raise ValueError("a directory that can be read in several ways")
                self._check_claims(infos, size)
                return {
                    info.filename.removesuffix(".npy"): self._read_header(archive, info)
                    for info in infos
                    if info.filename.endswith(".npy")
                }

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

    def _read_header(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
        where = f"{self.path}: {shown(info.filename)}"
        with archive.open(info) as member:
            start = io.BytesIO(member.read(MAX_HEADER_BYTES + 12))
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
        return Member(shape, dtype, start.tell())


def _read_rows(values: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    content = values.read(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(content, dtype).reshape(shape)  # of too few bytes: a ValueError
