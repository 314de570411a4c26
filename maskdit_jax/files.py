"""Files and folders that appear whole or not at all; folders that only one process writes to."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from maskdit_jax.errors import UserError, first_line
from maskdit_jax.log import log

LOCK = ".lock"
MAX_JSON_BYTES = 2**26  # no file of ours comes near; parsed, JSON takes many times its size in memory


@contextlib.contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder under; it becomes `path` when the block ends.

    An error in the block removes what was written. What a killed process left is removed by the next.
    """
    partial = path.with_name(f"{path.name}.partial")
    remove(partial)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        remove(partial)
        raise


def check_folder(path: Path) -> None:
    """Make sure that a folder is or can be made there.

    Raises:
      UserError: something else is.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is in the way, where a folder belongs: move it away")


def remove(path: Path) -> None:
    """Delete a file or a whole folder; nothing when there is none."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes, on any host that shares the file system, from writing to `folder`.

    The system gives the lock back when this process ends, however it ends.

    Raises:
      UserError: another process holds it, or nobody can write there.
    """
    with _open_lock(folder) as file:
        with contextlib.suppress(OSError):  # a full disk: the lock counts, not what it says
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}")
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()


def _open_lock(folder: Path) -> TextIO:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("a+")
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                with file:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                raise UserError(
                    f"{folder} is being written by {holder}: wait for it, stop it, or choose another folder"
                ) from error
            log.warning(
                f"warning: {folder} cannot be locked ({error.strerror}): let no other run write there"
            )
        # The holder before may have removed the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                return file
        file.close()


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      UserError: there is no such file, or it holds anything else.
    """
    if not file.is_file():  # a pipe would let us wait for ever
        raise UserError(f"{file}: no such file")
    try:
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise UserError(
                f"{file} is {size:,} bytes, more than the {MAX_JSON_BYTES:,} that are read of JSON"
            )
        content = json.loads(file.read_bytes())
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{file} is damaged: its lists and objects are nested too deeply") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {first_line(error, 120)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it holds a {type(content).__name__}, expected a JSON object")
    return content
