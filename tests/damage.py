"""Ways to spoil a sound input, each a function of its path: one line of a table in tests/test_hostile.py.

`name` is the file's name in the input's folder, "" where the input itself is one file.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path], object]


def file_of(path: Path, name: str) -> Path:
    return path / name if name else path


def content(name: str, new: bytes) -> Damage:
    """The file holds `new`."""
    return lambda path: file_of(path, name).write_bytes(new)


def changed(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """The file holds what `change` makes of its bytes."""

    def damage(path: Path) -> None:
        file = file_of(path, name)
        file.write_bytes(change(file.read_bytes()))

    return damage


def cut(name: str, size: int) -> Damage:
    """The file ends after `size` bytes, negative: so many bytes early."""
    return changed(name, lambda old: old[:size])


def json_with(name: str, **new: Any) -> Damage:
    """The JSON object in the file has other values; `...` removes the key."""

    def change(old: bytes) -> bytes:
        kept = {key: value for key, value in (json.loads(old) | new).items() if value is not ...}
        return json.dumps(kept).encode()

    return changed(name, change)


def deep(name: str) -> Damage:
    """The file is JSON, nested too deeply for a parser that calls itself."""
    return content(name, b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")


def removed(name: str) -> Damage:
    return lambda path: file_of(path, name).unlink()


def folder(name: str) -> Damage:
    """A folder stands in place of the file."""

    def damage(path: Path) -> None:
        file_of(path, name).unlink()
        file_of(path, name).mkdir()

    return damage


def pipe(name: str) -> Damage:
    """A named pipe, into which nobody writes, stands in place of the file."""

    def damage(path: Path) -> None:
        file_of(path, name).unlink()
        os.mkfifo(file_of(path, name))

    return damage


def huge(name: str, size: int) -> Damage:
    """The file grows to `size` bytes by a hole, which takes no place on the disk."""
    return lambda path: os.truncate(file_of(path, name), size)
