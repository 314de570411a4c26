"""Several configurations or options of one, block by block in turn in one process."""

from collections.abc import Mapping
from typing import Any

from maskdit_jax.benchmark.side import Run, Side
from maskdit_jax.benchmark.step import WARM_UP_STEPS
from maskdit_jax.benchmark.turns import Usage, ratio, spreads, take_turns
from maskdit_jax.benchmark.worker import Worker

PROGRAM, PROCESS = "program_bytes", "peak_bytes"
RATIOS = ("flops_per_image", PROGRAM, PROCESS)


def compare(sides: Mapping[str, Side], *, rounds: int, steps: int, peak: bool = False) -> dict[str, Any]:
    """Time sides against each other; the first is what the others are compared with.

    Returns:
      sides: what each is (`about`), took for an image (wall_s, cpu_s, page_faults: median, least, largest
        of the blocks) and its images_per_s; of a step program_bytes, what its program holds at once; with
        `peak` also peak_bytes, the most that a fresh process with that side alone held: of a GPU its
        allocator, otherwise the process's memory (VmHWM), compilation and all.
      ratios: each other side to the first: wall_s and cpu_s of an image (median, least, largest of the
        rounds), flops_per_image, and the bytes.

    Raises:
      UserError: a configuration that cannot be.
    """
    for side in sides.values():
        side.loaded()  # a slip is said before anything is compiled, or another process needs the device
    peaks = {name: {PROCESS: _peak_of(name, side)} for name, side in sides.items()} if peak else {}
    runs: dict[str, Run] = {name: side.start() for name, side in sides.items()}
    for run in runs.values():
        run.run(1 if sides[next(iter(sides))].sampling else WARM_UP_STEPS)
    blocks = {
        name: [Usage(*(x / runs[name].batch_size for x in usage)) for usage in usages]
        for name, usages in take_turns({n: r.block for n, r in runs.items()}, rounds, steps).items()
    }
    found: dict[str, dict[str, Any]] = {}
    for name, usages in blocks.items():
        took = spreads(usages)
        what = {"config": sides[name].config, "overrides": sides[name].overrides}
        found[name] = what | runs[name].about() | took | {"images_per_s": 1 / took["wall_s"][0]}
        found[name] |= peaks.get(name, {})
    first, *others = found
    return {
        "rounds": rounds,
        "steps": steps,
        "sides": found,
        "ratios": {
            name: {field: list(ratio(blocks[name], blocks[first], field)) for field in ("wall_s", "cpu_s")}
            | {field: found[name][field] / found[first][field] for field in RATIOS if field in found[first]}
            for name in others
        },
    }


def _peak_of(name: str, side: Side) -> int:
    worker = Worker(name, {"side": "ours"} | side._asdict())
    try:
        worker.block(1)
        return worker.peak_bytes
    finally:
        worker.close()


def describe(result: dict[str, Any]) -> str:
    """A table for a person: a line for each side, and it to the first."""
    width = max(len(name) for name in result["sides"])
    lines = [f"{'':<{width}}{'images/s':>10}{'program GB':>12}{'peak GB':>9}  to the first (range)"]
    for name, side in result["sides"].items():
        program, peak = (f"{side[x] / 1e9:.2f}" if x in side else "" for x in (PROGRAM, PROCESS))
        line = f"{name:<{width}}{side['images_per_s']:>10,.1f}{program:>12}{peak:>9}"
        if ratios := result["ratios"].get(name):
            (wall, low, high), (cpu, *_) = ratios["wall_s"], ratios["cpu_s"]
            line += f"  time {wall:.2f} ({low:.2f} … {high:.2f}), CPU time {cpu:.2f}"
            words = {"flops_per_image": "FLOPs", PROGRAM: "program", PROCESS: "peak"}
            line += "".join(f", {words[x]} {ratios[x]:.2f}" for x in RATIOS if x in ratios)
        lines.append(line)
    return "\n".join(lines)
