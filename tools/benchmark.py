"""Speed and memory of the training step of any config, on synthetic data; beside torch's with --torch."""

import json
from pathlib import Path
from typing import Any

import jax

from maskdit_jax.allocator import keep_memory
from maskdit_jax.benchmark.against_torch import FORMS, compare_with_torch, describe_comparison
from maskdit_jax.benchmark.step import benchmark, compile_step, describe_program
from maskdit_jax.config import resolve
from maskdit_jax.config_file import load
from maskdit_jax.distributed.hosts import check_devices
from maskdit_jax.errors import Parser, UserError, one_line_errors
from maskdit_jax.training.build import build


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="file such as configs/digits.py")
    parser.add_argument("--batch", type=int, help="items per step; default: the config's")
    parser.add_argument("--blocks", type=int, default=5, help="blocks timed; the median counts")
    parser.add_argument("--steps", type=int, default=20, help="steps of a block")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--compile_only", action="store_true", help="compile from shapes, run nothing")
    parser.add_argument(
        "--torch",
        nargs="?",
        const="eager",
        metavar="FORMS",
        help="take turns with plain torch's step of the same architecture, in processes: eager (default), "
        "compiled or eager,compiled",
    )
    flags, overrides = parser.parse_known_args()
    keep_memory()
    with one_line_errors():
        for name in ("blocks", "steps"):
            if getattr(flags, name) < 1:
                raise UserError(f"--{name}={getattr(flags, name)} must be at least 1")
        if flags.json and not flags.json.parent.is_dir():
            raise UserError(f"--json={flags.json}: there is no folder {flags.json.parent}")
        result, words = measure(flags, overrides)
        text = json.dumps({"config": flags.config, "overrides": overrides} | result, indent=1)
        if flags.json:
            flags.json.write_text(text)
        print(text)
        print(words)


def measure(flags: Any, overrides: list[str]) -> tuple[dict[str, Any], str]:
    """The result that is asked for, and what to say of it."""
    if flags.torch:
        forms = flags.torch.split(",")
        if not set(forms) <= set(FORMS):
            raise UserError(f"--torch={flags.torch}: expected eager, compiled or both, with a comma")
        result = compare_with_torch(
            flags.config, overrides, batch=flags.batch, forms=forms, rounds=flags.blocks, steps=flags.steps
        )
        return result, describe_comparison(result)
    check_devices()
    config = load(flags.config, overrides)
    if flags.batch is not None:
        config.training.batch_size = flags.batch
    config = resolve(config, device_count=jax.device_count())
    if flags.compile_only:
        compiled, seconds = compile_step(config, build(config))
        result = {"batch_size": config.training.batch_size, "compile_s": seconds}
        return result | describe_program(compiled), f"compiled in {seconds:.1f} s"
    result = benchmark(config, blocks=flags.blocks, steps=flags.steps)
    return result, f"{result['images_per_s']:,.1f} images/s, {result['step_s'] * 1000:.1f} ms a step"


if __name__ == "__main__":
    main()
