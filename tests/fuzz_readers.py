"""Random damage: python tests/fuzz_readers.py --reader=tar --seed=0 --count=2000

Each input is a sound one (tests/readers.py) with a few mutations that follow from (seed, number) alone. A
child process with bounded memory and time reads it; one child reads many inputs, and a new one is started
when it dies. An input must be read, or be refused in one line with nothing half-written. Anything else is
kept under --keep and ends the command with exit code 1; --number=N repeats input N alone.
"""

import argparse
import collections
import contextlib
import multiprocessing
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from readers import READERS
from test_hostile import CLEAR, listing, memory_mb, sound

from maskdit_jax.errors import UserError

SECONDS, MEMORY_MB, ADDRESS_SPACE = 10, 500, 4 * 2**30  # the last: beyond what a child has after its start
BLOCKS = (1, 8, 64, 512, 4096)
NUMBERS = (
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b'"x"',
    b"null",
    b"[]",
    b"{}",
    b"true",
    b"9" * 30,
    b"4294967296",
    b"",
)


# Mutations: each changes a file's bytes somewhere


def place(content: bytearray, rng: random.Random) -> int:
    """Anywhere, or near the start of a page or block, where headers are, or at a byte that is not zero."""
    anywhere = rng.randrange(len(content) + 1)
    match rng.randrange(3):
        case 0:
            return anywhere
        case 1:
            step = rng.choice((512, 4096))
            return min(anywhere // step * step + rng.randrange(64), len(content))
        case _:
            return next((i for i in range(anywhere, len(content)) if content[i]), anywhere)


def flip(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = place(content, rng)
        if at < len(content):
            content[at] ^= 1 << rng.randrange(8)


def cut(content: bytearray, rng: random.Random) -> None:
    del content[place(content, rng) :]


def insert(content: bytearray, rng: random.Random) -> None:
    at = place(content, rng)
    content[at:at] = rng.choice((rng.randbytes, bytes))(rng.choice(BLOCKS))


def delete(content: bytearray, rng: random.Random) -> None:
    at = place(content, rng)
    del content[at : at + rng.choice(BLOCKS)]


def repeat(content: bytearray, rng: random.Random) -> None:
    at = place(content, rng)
    content[at:at] = content[at : at + rng.choice(BLOCKS)] * rng.choice((1, 2, 100))


def swap(content: bytearray, rng: random.Random) -> None:
    """Two blocks of one size change places, or one is copied over the other."""
    size, (first, second) = rng.choice(BLOCKS), sorted((place(content, rng), place(content, rng)))
    one, other = content[first : first + size], content[second : second + size]
    if second - first >= size and len(other) == size:
        content[second : second + size] = one
        if rng.random() < 0.5:
            content[first : first + size] = other


def binary_number(content: bytearray, rng: random.Random) -> None:
    """A number that is huge, negative or just beyond, of 1 to 8 bytes and either order, is written over."""
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(
        (0, 1, -1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1, 2 ** (4 * size), len(content))
    )
    at = place(content, rng)
    raw = (value % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))
    content[at : at + size] = raw


def text_number(content: bytearray, rng: random.Random) -> None:
    """Digits somewhere become another number or word, of the same length or not."""
    found = list(re.finditer(rb"-?\d[\d.]*", content[:100_000]))
    if found:
        old, new = rng.choice(found), rng.choice(NUMBERS)
        new = new.ljust(len(old[0]))[: len(old[0])] if rng.random() < 0.3 else new
        content[old.start() : old.end()] = new


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    *(flip, cut, insert, delete, repeat, swap, binary_number, text_number),
)


def make_input(reader: str, folder: Path, seed: int, number: int) -> tuple[Path, str]:
    """Write input `number`; its path, and what was done to it."""
    rng = random.Random(f"{reader} {seed} {number}")
    path = READERS[reader].good(folder)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        file, mutation = rng.choice(files), rng.choice(MUTATIONS)
        content = bytearray(file.read_bytes())
        mutation(content, rng)
        file.write_bytes(content)
        done.append(f"{mutation.__name__} {file.name}")
    if rng.random() < 0.5:
        READERS[reader].repair(path)
    return path, ", ".join(done)


# The child that reads


def read_all(reader: str, pipe: Connection) -> None:
    """Read each path that comes; answer (what happened, details)."""
    sound(reader)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if CLEAR.exists() else 0
    )
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or hard > used + ADDRESS_SPACE:
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, hard))
    pipe.send(("ready", ""))
    while path := pipe.recv():
        pipe.send(read_one(reader, path))


def read_one(reader: str, path: Path) -> tuple[str, str]:
    before = listing(path.parent)
    if CLEAR.exists():
        CLEAR.write_text("5")
    memory = memory_mb("VmRSS")
    try:
        READERS[reader].read(path)
        what, details = "accepted", ""
    except UserError as error:
        what, details = "refused", str(error)
        if not details.isprintable() or not 0 < len(details) < 500:
            what = "not one line"
        elif listing(path.parent) != before:
            what, details = "half-written", f"{details}; {sorted(listing(path.parent))}"
    except BaseException:
        what, details = "traceback", traceback.format_exc()
    grown = memory_mb("VmHWM") - memory
    return ("memory", f"{grown:.0f} MB; {details}") if grown > MEMORY_MB else (what, details)


class Child:
    def __init__(self, reader: str):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=read_all, args=(reader, end), daemon=True)
        self.process.start()
        end.close()
        self.pipe.recv()  # it has imported what it needs

    def read(self, path: Path) -> tuple[str, str]:
        try:
            self.pipe.send(path)
            if not self.pipe.poll(SECONDS):
                return "time", f"more than {SECONDS} s"
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode or 0
            return "died", signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def fuzz(reader: str, seed: int, numbers: range, keep: Path) -> collections.Counter[str]:
    """How many inputs ended how; those that were neither read nor refused are in `keep` and printed."""
    counts: collections.Counter[str] = collections.Counter()
    child, slowest, started = Child(reader), (0.0, -1), time.monotonic()
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as at_end:
        at_end.callback(lambda: child.stop())
        for number in numbers:
            folder = Path(root) / f"{number}"
            path, how = make_input(reader, folder, seed, number)
            begun = time.monotonic()
            what, details = child.read(path)
            slowest = max(slowest, (time.monotonic() - begun, number))
            counts[what] += 1
            if what not in ("accepted", "refused"):
                place = shutil.copytree(folder, keep / f"{reader}-{seed}-{number}", dirs_exist_ok=True)
                print(f"{reader} {number}: {what} after {how}; kept in {place}\n{details}", flush=True)
            elif len(numbers) == 1:
                print(f"{reader} {number}: {what} after {how}\n{details}")
            if what in ("time", "died", "memory"):
                child.stop()
                child = Child(reader)
            shutil.rmtree(folder)
    print(
        f"{reader}, seed {seed}: {dict(sorted(counts.items()))} of {len(numbers):,} in "
        f"{time.monotonic() - started:.0f} s, the slowest (number {slowest[1]}) {slowest[0]:.1f} s",
        flush=True,
    )
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--reader", choices=READERS, action="append", help="default: every one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--number", type=int, help="read this input alone")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz_readers")
    flags = parser.parse_args()
    numbers = range(flags.count) if flags.number is None else range(flags.number, flags.number + 1)
    counts = [fuzz(reader, flags.seed, numbers, flags.keep) for reader in flags.reader or READERS]
    sys.exit(any(set(count) - {"accepted", "refused"} for count in counts))


if __name__ == "__main__":
    main()
