"""Files and folders that appear whole or not at all; folders that only one process writes to."""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from maskdit_jax.errors import UserError

log = logging.getLogger("maskdit_jax")

LOCK = ".lock"


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                raise UserError(
                    f"{folder} is being written by {file.read().strip() or 'another process'}: wait for it, "
                    "stop it, or choose another folder"
                ) from error
            log.warning(
                f"warning: {folder} cannot be locked ({error.strerror}): let no other run write there"
            )
        with contextlib.suppress(OSError):  # a full disk: the lock counts, not what it says
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
