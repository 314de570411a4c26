"""Sides that take turns, and how much one takes of what another does."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Usage(NamedTuple):
    """What a step took, the mean of a block of steps: seconds, CPU seconds of all threads, page faults."""

    wall_s: float
    cpu_s: float
    page_faults: float


class Spread(NamedTuple):
    """Of the blocks, or of the rounds."""

    median: float
    min: float
    max: float


Block = Callable[[int], Usage]  # of so many steps, waited for


def measured(run: Callable[[int], None], steps: int) -> Usage:
    """What a step of `run(steps)`, which returns when all are done, took this process."""
    began = clock()
    run(steps)
    return since(began, steps)


def clock() -> Usage:
    """What this process has taken up to now; its wall time has no beginning."""
    taken = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(time.monotonic(), taken.ru_utime + taken.ru_stime, taken.ru_minflt)


def since(began: Usage, steps: int) -> Usage:
    """What each of so many steps took since then."""
    return Usage(*((now - then) / steps for now, then in zip(clock(), began)))


def take_turns(sides: Mapping[str, Block], rounds: int, steps: int) -> dict[str, list[Usage]]:
    """A block of steps of each side in every round, every other round in reverse: none is always first."""
    usages: dict[str, list[Usage]] = {name: [] for name in sides}
    for number in range(rounds):
        names = list(sides)
        for name in reversed(names) if number % 2 else names:
            usages[name].append(sides[name](steps))
    return usages


def spread(values: Sequence[float]) -> Spread:
    """Median, least and largest."""
    return Spread(statistics.median(values), min(values), max(values))


def spreads(blocks: Sequence[Usage]) -> dict[str, list[float]]:
    """Median, least and largest of each field."""
    return {field: list(spread([getattr(b, field) for b in blocks])) for field in Usage._fields}


def ratio(above: Sequence[Usage], below: Sequence[Usage], field: str) -> Spread:
    """Of one side's wall_s, cpu_s or page_faults to another's, round by round: what a busy machine does to
    both of a round leaves it alone."""
    return spread([getattr(a, field) / max(getattr(b, field), 1e-9) for a, b in zip(above, below)])
