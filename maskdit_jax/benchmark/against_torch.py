"""Our training step and plain torch's of the same architecture, taking turns in processes of their own."""

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from maskdit_jax.benchmark.turns import Block, ratio, spreads, take_turns
from maskdit_jax.benchmark.worker import Worker, workers
from maskdit_jax.config import ConfigDict
from maskdit_jax.errors import UserError
from maskdit_jax.training.build import build

FORMS = ("eager", "compiled")
OURS = "maskdit_jax"


def torch_options(config: ConfigDict) -> dict[str, Any]:
    """What torch's side needs to know of a resolved configuration.

    Raises:
      UserError: it is not one that the torch model can be.
    """
    if config.method.name != "maskdit":
        raise UserError(f"the torch model is MaskDiT's: method.name={config.method.name}; use maskdit")
    for name, section, value in (
        ("optimizer.clip_norm", config.optimizer, 0),
        ("training.accumulate", config.training, 1),
        ("ema.rule", config.ema, "constant"),
    ):
        if section[name.partition(".")[2]] != value:
            raise UserError(f"the torch step has no {name}: leave it at {value}")
    if jax.default_backend() == "cpu" and config.compute.precision == "bfloat16":
        raise UserError(
            "compute.precision=bfloat16: on a CPU torch computes in float32; use compute.precision=float32"
        )
    method = config.method.to_dict()
    network = {name: value for name, value in method["network"].items() if name != "size"}
    data = {name: config.data[name] for name in ("image_size", "channels", "num_classes")}
    optimizer = config.optimizer.to_dict()
    return {
        "method": {name: value for name, value in method.items() if name != "network"},
        "network": network,
        "data": data,
        "optimizer": optimizer,
        "ema_decay": config.ema.decay,
        "num_keep": build(config).num_keep(0),
        "batch_size": config.training.batch_size,
        "precision": config.compute.precision,
    }


def compare_with_torch(
    ours: Mapping[str, Any], *, forms: Sequence[str] = ("eager",), rounds: int, steps: int
) -> dict[str, Any]:
    """Time our step, `ours` as `Side` has it, and torch's of the same configuration, block by block in turn.

    Every side is a process that has all cores while it is its turn. The first step of a turn is not
    measured: it pays for the caches and the memory that the other side has taken.

    Returns:
      sides: what each took for a step (wall_s, cpu_s, page_faults: median, least, largest), images_per_s,
        peak_bytes (a GPU's allocator, or the process's VmHWM); ratios: ours to each of torch's, of rounds.

    Raises:
      UserError: torch is not installed, or a configuration that its model cannot be.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("torch is not installed: pip install '.[torch]'")
    spec = {"side": "ours", "torch_options": True, **ours}
    with workers({OURS: spec}, share=True) as our_side:
        options = our_side[OURS].about.pop("torch_options")
        spec = {"side": "torch", "options": options, "forms": list(forms)}
        with workers({"torch": spec}, share=True) as torch_side:
            sides = our_side | torch_side
            return {"about": {name: side.about for name, side in sides.items()}} | _measure(
                sides[OURS], sides["torch"], forms, rounds, steps
            )


def _measure(ours: Worker, torch: Worker, forms: Sequence[str], rounds: int, steps: int) -> dict[str, Any]:
    runs: dict[str, Block] = {OURS: functools.partial(ours.block, warm_up=1)}
    runs |= {f"torch {form}": functools.partial(torch.block, warm_up=1, form=form) for form in forms}
    usages = take_turns(runs, rounds, steps)
    result: dict[str, Any] = {"rounds": rounds, "steps": steps, "sides": {}, "ratios": {}}
    for label, blocks in usages.items():
        took = spreads(blocks)
        result["sides"][label] = took | {
            "images_per_s": ours.about["batch_size"] / took["wall_s"][0],
            "peak_bytes": (ours if label == OURS else torch).peak_bytes,
        }
        if label != OURS:
            result["ratios"][label] = {
                field: list(ratio(usages[OURS], blocks, field)) for field in ("wall_s", "cpu_s")
            }
    return result


def describe_comparison(result: dict[str, Any]) -> str:
    """A table for a person: a line for each side, and ours to it."""
    lines = [f"{'':<36}{'ms a step':>10}{'CPU ms':>10}{'faults':>10}{'peak GB':>9}  ours to it (range)"]
    for label, took in result["sides"].items():
        wall_s, cpu_s, faults = (took[field][0] for field in ("wall_s", "cpu_s", "page_faults"))
        line = f"{label:<36}{wall_s * 1e3:>10,.1f}{cpu_s * 1e3:>10,.1f}{faults:>10,.0f}"
        line += f"{took['peak_bytes'] / 1e9:>9.2f}"
        if label in result["ratios"]:
            (wall, low, high), (cpu, *_) = (result["ratios"][label][field] for field in ("wall_s", "cpu_s"))
            line += f"  time {wall:.2f} ({low:.2f} … {high:.2f}), CPU time {cpu:.2f}"
        lines.append(line)
    return "\n".join(lines)
