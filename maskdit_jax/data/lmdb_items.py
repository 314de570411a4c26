"""Published latents as an LMDB: z-I the moments as bytes, y-I the class as text, `length` how many.

LMDB reads its file as memory and believes what it finds there: a damaged file can end the process that
reads it with a bus error, or keep it busy for ever. So a second process reads, this module run as a
command, and tells the first one labels and then items over a pipe, as bytes; what it cannot read it says
in one line on its standard error, with `REFUSED` as exit code.
"""

import array
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from maskdit_jax.data.published import CHANNELS, MAX_ITEM_BYTES, Items, number, side_of
from maskdit_jax.errors import UserError, first_line, printable
from maskdit_jax.log import counted, log

INPUT = "the folder that holds data.mdb"
REFUSED = 3
DAMAGE = (-signal.SIGBUS, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL)
LABELS_PER_MESSAGE = 1000
ITEMS_PER_REQUEST = 64  # few enough to wait in memory, many enough that asking costs nothing
MAX_SILENCE_S = 120  # a disk may have to wake up; a thousand look-ups or one item take no longer than this
ROOT = Path(__file__).parents[2]


# The process that asks


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
    reader = _Reader(file)
    try:
        labels = np.frombuffer(b"".join(iter(lambda: reader.receive(8 * LABELS_PER_MESSAGE), b"")), np.int64)
        size = int.from_bytes(reader.receive(8), "little")
        log.info(f"{printable(file)}: {counted(len(labels), 'item')}")
        side = side_of(size)

        def read(numbers: np.ndarray) -> Iterator[np.ndarray]:
            for start in range(0, len(numbers), ITEMS_PER_REQUEST):
                part = numbers[start : start + ITEMS_PER_REQUEST].astype(np.int64)
                reader.send(part.tobytes())
                # All of them before the first is given away: whoever stops in between leaves none behind.
                for item in [reader.receive(size) for _ in part]:
                    yield np.frombuffer(item, "<f4").reshape(CHANNELS, side, side)

        yield Items(labels, read, lambda number: f"{file}, item {number}")
    finally:
        reader.stop()


class _Reader:
    """The second process; whatever ends or stops it becomes a UserError here."""

    def __init__(self, file: Path):
        self._file = file
        self._pipe, theirs = Pipe()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with theirs:
            self._process = subprocess.Popen(
                # -P: not the modules that may lie in the current folder.
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), file],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )

    def send(self, message: bytes) -> None:
        try:
            self._pipe.send_bytes(message)
        except OSError:
            raise self._ended() from None

    def receive(self, max_bytes: int) -> bytes:
        try:
            if not self._pipe.poll(MAX_SILENCE_S):
                raise UserError(
                    f"{self._file} is damaged, or its disk does not answer: nothing was read of it for "
                    f"{MAX_SILENCE_S} s"
                )
            return self._pipe.recv_bytes(max_bytes)
        except (EOFError, OSError):
            raise self._ended() from None

    def _ended(self) -> UserError:
        """Why there is nothing more to hear."""
        try:
            said = self._process.communicate(timeout=5)[1].decode(errors="replace").strip()
        except subprocess.TimeoutExpired:  # it said more than it was asked for
            return UserError(f"{self._file} is damaged: its items change while they are read")
        code = self._process.returncode
        if code == REFUSED:
            return UserError(said)
        if code in DAMAGE:
            why = signal.Signals(-code).name
            return UserError(f"{self._file} is damaged: it ended the process that read it ({why})")
        why = signal.Signals(-code).name if code < 0 else said[-200:] or f"exit code {code}"
        return UserError(f"{self._file} could not be read: the process that read it ended ({why})")

    def stop(self) -> None:
        self._pipe.close()
        with self._process:  # its end is waited for
            self._process.kill()


# The process that reads


def _serve(pipe: Connection, file: Path) -> None:
    """Send the labels, in parts, an empty message and the size of an item; then the items asked for."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError("--format=lmdb needs the package lmdb: pip install lmdb") from error
    try:
        with lmdb.open(str(file.parent), readonly=True, lock=False, readahead=False, subdir=True) as env:
            bytes_there, expected = file.stat().st_size, (env.info()["last_pgno"] + 1) * env.stat()["psize"]
            if bytes_there < expected:
                raise UserError(f"{file} is cut short: {bytes_there:,} of {expected:,} bytes")
            # As buffers, the values are not copied: looking at their size does not read them.
            with env.begin(buffers=True) as transaction:
                size = _send_labels(pipe, transaction, file)
                pipe.send_bytes(b"")
                pipe.send_bytes(size.to_bytes(8, "little"))
                while True:
                    for i in np.frombuffer(pipe.recv_bytes(8 * ITEMS_PER_REQUEST), np.int64).tolist():
                        pipe.send_bytes(_get(transaction, b"z-%d" % i, file))
    except (UserError, EOFError, BrokenPipeError):
        raise
    except Exception as error:  # damage makes LMDB and its package fail in many ways
        raise UserError(f"{file} is damaged or not an LMDB: {first_line(error, 200)}") from error


def _send_labels(pipe: Connection, transaction: Any, file: Path) -> int:
    """The size of an item of an LMDB in which every item is there and of that size, and nothing else is."""
    length = _number(transaction, b"length", file)
    first, labels = 0, array.array("q")
    for i in range(length):
        size = len(_get(transaction, b"z-%d" % i, file))
        if not side_of(size):
            raise UserError(f"{file}: z-{i} is {size:,} bytes, which are no [8, H, H] float32")
        first = first or size
        if size != first:
            raise UserError(f"{file}: z-{i} is {size:,} bytes, but z-0 is {first:,}")
        labels.append(_number(transaction, b"y-%d" % i, file))
        if len(labels) == LABELS_PER_MESSAGE:
            pipe.send_bytes(labels)
            labels = array.array("q")
    if labels:
        pipe.send_bytes(labels)
    entries, expected = transaction.stat()["entries"], 2 * length + 1
    if entries != expected:
        raise UserError(f"{file} has {entries:,} keys, but length={length} makes {expected:,}: it holds more")
    if first > MAX_ITEM_BYTES or length * first > file.stat().st_size:
        raise UserError(f"{file} is damaged: it cannot hold {length:,} items of {first:,} bytes")
    return first


def _get(transaction: Any, key: bytes, file: Path) -> Any:
    value = transaction.get(key)
    if value is None:
        raise UserError(f"{file}: {key.decode()} is missing")
    return value


def _number(transaction: Any, key: bytes, file: Path) -> int:
    return number(bytes(_get(transaction, key, file)[:40]), f"{file}: {key.decode()}")


def main() -> None:
    try:
        _serve(Connection(int(sys.argv[1])), Path(sys.argv[2]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    except (EOFError, BrokenPipeError):
        pass  # nobody asks any more


if __name__ == "__main__":
    main()
