"""Damaged and hostile files: one line each, nothing half-written, bounded memory and time.

A new case is one line of a table: the reader, what is wrong, how a sound input gets so (tests/damage.py),
and what the line must say.
"""

import functools
import re
import tempfile
import time
from pathlib import Path

import hostile_data
import hostile_references
import hostile_weights
import pytest
from readers import READERS

from maskdit_jax.errors import UserError

CASES = [*hostile_data.CASES, *hostile_weights.CASES, *hostile_references.CASES]
MAX_SECONDS, MAX_MB = 5, 200
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@functools.cache
def sound(reader: str) -> object:
    """What a sound input gives. It also loads what the reader imports, before time and memory count."""
    with tempfile.TemporaryDirectory() as folder:
        return READERS[reader].read(READERS[reader].good(Path(folder)))


def listing(folder: Path) -> dict[str, int]:
    """Size of every file, and of whatever else is no folder."""
    return {
        str(p.relative_to(folder)): p.lstat().st_size for p in sorted(folder.rglob("*")) if not p.is_dir()
    }


def memory_mb(field: str) -> float:
    """VmRSS, memory now, VmHWM, its peak since `CLEAR` was told 5, or VmSize; 0 where no system says it."""
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text()) if CLEAR.exists() else None
    return int(found[1]) / 1024 if found else 0


@pytest.mark.parametrize("reader", READERS)
def test_sound_input_is_read(reader):
    """So a case below cannot pass because everything is refused."""
    assert sound(reader) is not None


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}: {case[1]}")
def test_hostile_input_is_refused_in_one_line(case, tmp_path, monkeypatch):
    reader, _, damage, *fragments = case
    sound(reader)
    path = READERS[reader].good(tmp_path)
    damage(path)
    before = listing(tmp_path)
    monkeypatch.chdir(tmp_path)  # where code that a file names would leave its mark
    if CLEAR.exists():
        CLEAR.write_text("5")
    memory, started = memory_mb("VmRSS"), time.monotonic()
    with pytest.raises(UserError) as refused:
        READERS[reader].read(path)
    seconds, grown = time.monotonic() - started, memory_mb("VmHWM") - memory
    line = str(refused.value)
    assert line.isprintable() and 0 < len(line) < 500
    for fragment in fragments:
        assert fragment in line
    assert listing(tmp_path) == before
    assert seconds < MAX_SECONDS
    assert grown < MAX_MB


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_random_damage_is_read_or_refused_in_one_line(reader, tmp_path):
    """A short run of tests/fuzz_readers.py."""
    from fuzz_readers import fuzz  # which imports this module

    assert set(fuzz(reader, seed=0, numbers=range(100), keep=tmp_path)) <= {"accepted", "refused"}
