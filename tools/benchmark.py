"""Speed and memory of the training step of any config, on synthetic data."""

import json
from pathlib import Path

import jax

from maskdit_jax.allocator import keep_memory
from maskdit_jax.config import resolve
from maskdit_jax.config_file import load
from maskdit_jax.errors import Parser, UserError, one_line_errors
from maskdit_jax.training.benchmark import benchmark, compile_step, describe_program
from maskdit_jax.training.build import build


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, help="items per step; default: the config's")
    parser.add_argument("--blocks", type=int, default=5, help="blocks timed; the median counts")
    parser.add_argument("--steps", type=int, default=20, help="steps of a block")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--compile_only", action="store_true", help="compile from shapes, run nothing")
    flags, overrides = parser.parse_known_args()
    keep_memory()
    with one_line_errors():
        for name in ("blocks", "steps"):
            if getattr(flags, name) < 1:
                raise UserError(f"--{name}={getattr(flags, name)} must be at least 1")
        if flags.json and not flags.json.parent.is_dir():
            raise UserError(f"--json={flags.json}: there is no folder {flags.json.parent}")
        config = load(flags.config, overrides)
        if flags.batch is not None:
            config.training.batch_size = flags.batch
        config = resolve(config, device_count=jax.device_count())
        if flags.compile_only:
            compiled, seconds = compile_step(config, build(config))
            result = {"batch_size": config.training.batch_size, "compile_s": seconds}
            result |= describe_program(compiled)
        else:
            result = benchmark(config, blocks=flags.blocks, steps=flags.steps)
        result = {"config": flags.config, "overrides": overrides} | result
        text = json.dumps(result, indent=1)
        if flags.json:
            flags.json.write_text(text)
        print(text)
        if "step_s" in result:
            print(f"{result['images_per_s']:,.1f} images/s, {result['step_s'] * 1000:.1f} ms a step")
        else:
            print(f"compiled in {result['compile_s']:.1f} s")


if __name__ == "__main__":
    main()
