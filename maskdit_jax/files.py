"""Files and folders that appear whole or not at all."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


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
