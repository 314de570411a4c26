"""Speed and memory of training steps and of sampling, on synthetic data.

One configuration:    benchmark.py --config=in256 --batch=256
Several, in turn:     benchmark.py --compare=in256 --compare=in256_dit --batch=64
                      benchmark.py --config=in256 --compare=compute.remat=none --compare="compute.remat=mlp ema.decay=0.99"
A side of --compare is a configuration, options that differ (section.key=value), or both, with spaces between;
--config.section.key=value holds for all of them. The first is what the others are compared with.
The training loop:    benchmark.py --config=digits --loop --blocks=9 --steps=50
Sampling:             benchmark.py --config=in256 --batch=64 --sampling --config.sampling.num_steps=40
Beside torch:         benchmark.py --config=in256 --batch=128 --torch=eager,compiled
A new GPU:            benchmark.py --suite=gpu.json
"""  # noqa: E501, a command is a line

import argparse
import json
from pathlib import Path
from typing import Any

from maskdit_jax.benchmark import compare
from maskdit_jax.benchmark.against_torch import FORMS, compare_with_torch, describe_comparison
from maskdit_jax.benchmark.side import Side, measure_sampling, parse_sides
from maskdit_jax.benchmark.step import benchmark, compile_step, describe_program
from maskdit_jax.benchmark.suite import PIECES, run_suite
from maskdit_jax.errors import Parser, UserError, one_line_errors
from maskdit_jax.files import appears_whole
from maskdit_jax.log import log_to_stdout
from maskdit_jax.training.build import build

Result = tuple[dict[str, Any], str]  # for a file, and for a person


def main() -> None:
    flags, overrides = parser().parse_known_args()
    log_to_stdout()
    with one_line_errors():
        check(flags)
        if flags.suite:
            if overrides:
                raise UserError(f"{overrides[0]}: the suite has configurations of its own")
            pieces = flags.pieces.split(",") if flags.pieces else list(PIECES)
            run_suite(flags.suite, pieces, small=flags.small, limit_s=flags.limit_s)
            return
        common = Side(flags.config, overrides, flags.batch, flags.sampling, flags.guidance_interval)
        result, words = measure(flags, common)
        text = json.dumps({"config": flags.config, "overrides": overrides} | result, indent=1)
        if flags.json:
            with appears_whole(flags.json) as partial:
                partial.write_text(text)
        print(text)
        print(words)


def parser() -> Parser:
    """The flags."""
    made = Parser(description=__doc__)
    # The forms above are lines of their own.
    both: Any = (made.formatter_class, argparse.RawDescriptionHelpFormatter)
    made.formatter_class = type("Help", both, {})  # type: ignore[assignment]
    made.add_argument("--config", default="", help="file such as configs/digits.py")
    made.add_argument("--batch", type=int, help="items per step; default: the config's")
    made.add_argument("--blocks", type=int, default=5, help="blocks, or rounds, timed")
    made.add_argument("--steps", type=int, default=20, help="steps of a block")
    made.add_argument("--json", type=Path, help="file for the result")
    made.add_argument("--compile_only", action="store_true", help="compile from shapes, run nothing")
    made.add_argument("--compare", action="append", metavar="SIDE", help="once for each side; see above")
    made.add_argument(
        "--peak", action="store_true", help="of --compare: also peak memory, of each side alone in a process"
    )
    made.add_argument(
        "--loop", action="store_true", help="the training loop, with its data, beside the bare step"
    )
    made.add_argument("--sampling", action="store_true", help="samples instead of training steps")
    made.add_argument("--guidance_interval", type=interval, metavar="LOW,HIGH", help="of --sampling")
    made.add_argument(
        "--torch", nargs="?", const="eager", metavar="FORMS",
        help="plain torch's step of the same architecture beside ours: eager (default), compiled or both",
    )  # fmt: skip
    made.add_argument("--suite", type=Path, metavar="JSON", help="everything, and a table beside it")
    made.add_argument("--pieces", help=f"of the suite; default: {','.join(PIECES)}")
    made.add_argument("--limit_s", type=float, default=540, help="seconds for the suite")
    made.add_argument("--small", action="store_true", help="the suite with tiny networks, to try it on a CPU")
    return made


def interval(text: str) -> tuple[float, float]:
    """LOW,HIGH."""
    low, high = map(float, text.split(","))
    return low, high


def check(flags: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    for name in ("blocks", "steps", "batch", "limit_s"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    modes = [name for name in ("compare", "torch", "loop", "compile_only", "suite") if getattr(flags, name)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} do not go together: give one")
    if not (flags.config or flags.compare or flags.suite):
        raise UserError("give --config=FILE, --compare or --suite=JSON; --help explains them")
    if flags.sampling and modes and modes != ["compare"]:
        raise UserError(f"--sampling does not go with --{modes[0]}: it is for --config or --compare")
    for name, needs in (
        ("guidance_interval", "sampling"),
        ("peak", "compare"),
        ("pieces", "suite"),
        ("small", "suite"),
    ):
        if getattr(flags, name) and not getattr(flags, needs):
            raise UserError(f"--{name} is for --{needs}: give it too")
    for name in ("json", "suite"):
        file = getattr(flags, name)
        if file and not file.parent.is_dir():
            raise UserError(f"--{name}={file}: there is no folder {file.parent}")


def measure(flags: argparse.Namespace, common: Side) -> Result:
    """What is asked for."""
    if flags.compare:
        sides = parse_sides(flags.compare, common)
        result = compare.compare(sides, rounds=flags.blocks, steps=flags.steps, peak=flags.peak)
        return result, compare.describe(result)
    if flags.torch:
        forms = flags.torch.split(",")
        if not set(forms) <= set(FORMS):
            raise UserError(f"--torch={flags.torch}: expected eager, compiled or both, with a comma")
        result = compare_with_torch(common._asdict(), forms=forms, rounds=flags.blocks, steps=flags.steps)
        return result, describe_comparison(result)
    if flags.loop:
        # Of all forms this alone needs what reads data and logs.
        from maskdit_jax.benchmark.in_loop import compare_loop, describe_loop

        result = compare_loop(common, rounds=flags.blocks, steps=flags.steps)
        return result, describe_loop(result)
    if flags.sampling:
        result = measure_sampling(common, flags.blocks)
        nfe = result["network_evaluations"]
        return result, f"{result['images_per_s']:,.2f} images/s, {nfe} network evaluations each"
    config = common.resolved()
    if flags.compile_only:
        compiled, seconds = compile_step(config, build(config))
        result = {"batch_size": config.training.batch_size, "compile_s": seconds}
        return result | describe_program(compiled), f"compiled in {seconds:.1f} s"
    result = benchmark(config, blocks=flags.blocks, steps=flags.steps)
    return result, (
        f"{result['images_per_s']:,.1f} images/s, {result['step_s'] * 1000:.1f} ms a step, "
        f"{result['utilisation']:.1%} of a matrix product's FLOP/s"
    )


if __name__ == "__main__":
    main()
