"""The training loop beside the bare step: what data, metrics and the log cost."""

import math
import tempfile
from pathlib import Path
from typing import Any

import jax

from maskdit_jax.benchmark.side import Side
from maskdit_jax.benchmark.step import WARM_UP_STEPS, StepRun
from maskdit_jax.benchmark.turns import Usage, clock, ratio, since, spreads
from maskdit_jax.distributed.peers import Peers
from maskdit_jax.training import loop


def compare_loop(side: Side, *, rounds: int, steps: int) -> dict[str, Any]:
    """Train `side` with its data in a folder that is deleted, and time the bare step between blocks of steps.

    Blocks hold no preview, checkpoint or measurement; report.every_steps is as configured.

    Returns:
      loop, step: what a step took (wall_s, cpu_s, page_faults: median, least, largest of the blocks);
      ratios: the loop's images/s by the bare step's, the same in CPU time, of the rounds.

    Raises:
      UserError: the data or a configuration cannot be used.
    """
    config = side.loaded()
    config.training.num_steps = steps * (rounds + 1)
    config.checkpoint.every_steps = config.training.num_steps
    config.report.preview_steps = config.evaluation.every_steps = 0
    config = side.resolve(config)
    source = loop.open_configured_source(config)
    bare = StepRun(config)
    bare.run(WARM_UP_STEPS)
    turns = _Turns(bare, steps)
    with tempfile.TemporaryDirectory() as folder:
        loop.train(config, Path(folder) / "run", source, turns)
    result: dict[str, Any] = {"rounds": rounds, "steps": steps, "batch_size": bare.batch_size}
    for name, blocks in (("loop", turns.in_loop), ("step", turns.alone)):
        result[name] = spreads(blocks)
    fields = ("wall_s", "cpu_s")
    result["ratios"] = {field: list(ratio(turns.alone, turns.in_loop, field)) for field in fields}
    return result


class _Turns(Peers):
    """Told by the loop of every step, it lets the bare step have its turn after each block of them."""

    def __init__(self, bare: StepRun, steps: int):
        super().__init__({}, math.inf, math.inf)
        self.bare, self.steps = bare, steps
        self.in_loop: list[Usage] = []
        self.alone: list[Usage] = []
        self.began = clock()

    def at(self, step: int) -> None:
        super().at(step)
        if step == 0 or step % self.steps:
            return
        jax.block_until_ready(jax.live_arrays())
        if step > self.steps:  # the first block has compiled
            self.in_loop.append(since(self.began, self.steps))
            self.alone.append(self.bare.block(self.steps))
        self.began = clock()


def describe_loop(result: dict[str, Any]) -> str:
    """A line for a person."""
    (wall, low, high), (cpu, *_) = (result["ratios"][field] for field in ("wall_s", "cpu_s"))
    times = ", ".join(f"{name} {result[name]['wall_s'][0] * 1e3:,.1f} ms" for name in ("loop", "step"))
    return (
        f"the loop runs at {wall:.3f} ({low:.3f} … {high:.3f}) of the bare step's images/s, by CPU time "
        f"{cpu:.3f}: {times}"
    )
