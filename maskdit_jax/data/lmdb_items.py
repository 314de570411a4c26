"""Published latents as an LMDB: z-I the moments as bytes, y-I the class as text, `length` how many.

LMDB takes its file as memory and believes what it finds there: a damaged file can end the process that
reads it with a bus error, or keep it busy for ever. So a second process reads (lmdb_process.py), and here
its answers are judged.
"""

import array
import contextlib
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import numpy as np

from maskdit_jax.data import lmdb_process
from maskdit_jax.data.items import CHANNELS, MAX_ITEM_BYTES, Items, number, side_of
from maskdit_jax.data.lmdb_process import ABOUT, FAILED, RECORD
from maskdit_jax.errors import UserError, first_line, printable
from maskdit_jax.log import counted, log

INPUT = "the folder that holds data.mdb"
LABELS_PER_REQUEST = 1000
ITEMS_PER_REQUEST = 64  # few enough to wait in memory, many enough that asking costs nothing
MAX_SILENCE_S = 120  # a disk may have to wake up, but no request takes longer
SIGNALS_OF_DAMAGE = (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


@contextlib.contextmanager
def lmdb_items(folder: Path) -> Iterator[Items]:
    """Items of an LMDB, to be read inside the context only.

    Every key is looked up before the first item is read.

    Raises:
      UserError: an item is missing or is not what it should be, or the file is damaged in any way.
    """
    file = folder / "data.mdb"
    if not file.is_file():
        raise UserError(f"{file}: no such file; for --format=lmdb --input is {INPUT}")
    if importlib.util.find_spec("lmdb") is None:
        raise UserError("--format=lmdb needs the package lmdb: pip install lmdb")
    process = _Process(file)
    try:
        labels, size = _labels(process, file)
        log.info(f"{printable(file)}: {counted(len(labels), 'item')}")
        side = side_of(size)

        def read(numbers: np.ndarray) -> Iterator[np.ndarray]:
            for start in range(0, len(numbers), ITEMS_PER_REQUEST):
                keys = [f"z-{i}" for i in numbers[start : start + ITEMS_PER_REQUEST]]
                process.ask("=", keys)
                values = np.frombuffer(process.answer(size * len(keys)), "<f4")
                if values.nbytes != size * len(keys):
                    raise UserError(f"{file} is damaged: its items change while they are read")
                yield from values.reshape(len(keys), CHANNELS, side, side)

        yield Items(labels, read, lambda item: f"{file}, item {item}")
    finally:
        process.stop()


def _labels(process: "_Process", file: Path) -> tuple[np.ndarray, int]:
    """Labels [n] of an LMDB in which every item is there and of the same size, and nothing else is; that
    size in bytes."""
    entries, expected_bytes = ABOUT.unpack(process.answer(ABOUT.size))
    there = file.stat().st_size
    if there < expected_bytes:
        raise UserError(f"{file} is cut short: {there:,} of {expected_bytes:,} bytes")

    def look_up(keys: list[str]) -> Iterator[tuple[str, int, bytes]]:
        """Key, size of the value and its first bytes."""
        process.ask("?", keys)
        records = RECORD.iter_unpack(process.answer(RECORD.size * len(keys)))
        for key, (size, text) in zip(keys, records, strict=True):
            if size < 0:
                raise UserError(f"{file}: {key} is missing")
            yield key, size, text[:size]

    def numbered(key: str, text: bytes) -> int:
        return number(text, f"{file}: {key}")

    ((key, _, text),) = look_up(["length"])
    length, first = numbered(key, text), 0
    labels = array.array("q")
    for start in range(0, length, LABELS_PER_REQUEST):
        some = range(start, min(start + LABELS_PER_REQUEST, length))
        for key, size, text in look_up([f"{kind}-{i}" for i in some for kind in "zy"]):
            if key.startswith("y"):
                labels.append(numbered(key, text))
                continue
            if not side_of(size):
                raise UserError(f"{file}: {key} is {size:,} bytes, which are no [8, H, H] float32")
            first = first or size
            if size != first:
                raise UserError(f"{file}: {key} is {size:,} bytes, but z-0 is {first:,}")
    expected = 2 * length + 1
    if entries != expected:
        raise UserError(f"{file} has {entries:,} keys, but length={length} makes {expected:,}: it holds more")
    if first > MAX_ITEM_BYTES or length * first > there:
        raise UserError(f"{file} is damaged: {there:,} bytes cannot hold {length:,} items of {first:,}")
    return np.array(labels, np.int64), first


class _Process:
    """The process that reads; whatever it meets, ends or stops it becomes a UserError here."""

    def __init__(self, file: Path):
        self._file = file
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                # -P: no modules from beside the script, whose names are the package's.
                [sys.executable, "-P", lmdb_process.__file__, str(theirs.fileno()), file.parent],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )

    def ask(self, kind: str, keys: list[str]) -> None:
        try:
            self._pipe.send_bytes(f"{kind}{' '.join(keys)}".encode())
        except OSError:
            raise self._ended() from None

    def answer(self, max_bytes: int) -> bytes:
        try:
            if self._pipe.poll(MAX_SILENCE_S):
                return self._pipe.recv_bytes(max_bytes)
        except (EOFError, OSError):
            raise self._ended() from None
        raise UserError(
            f"{self._file} is damaged, or its disk does not answer: nothing came of it for {MAX_SILENCE_S} s"
        )

    def _ended(self) -> UserError:
        """Why there is nothing more to hear."""
        try:
            said = self._process.communicate(timeout=5)[1].decode(errors="replace")
        except subprocess.TimeoutExpired:  # it lives, but its answer was longer than it had said before
            return UserError(f"{self._file} is damaged: its items change while they are read")
        code = self._process.returncode
        if code == FAILED:
            return UserError(f"{self._file} is damaged or not an LMDB: {first_line(ValueError(said), 200)}")
        why = signal.Signals(-code).name if code < 0 else first_line(ValueError(said[-200:]))
        damaged = "is damaged" if -code in SIGNALS_OF_DAMAGE else "could not be read"
        return UserError(f"{self._file} {damaged}: the process that read it was ended by {why}")

    def stop(self) -> None:
        self._pipe.close()
        with self._process:  # its end is waited for
            self._process.kill()
