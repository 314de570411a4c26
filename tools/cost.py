"""What a configuration costs: parameters, multiply-adds, memory, part by part; or methods side by side.

Without --config MaskDiT beside those that its paper compares it with, as published. Nothing is run.
"""

import json
from pathlib import Path
from typing import Any

import jax

from maskdit_jax.config import resolve
from maskdit_jax.config_file import load
from maskdit_jax.errors import Parser, UserError, one_line_errors
from maskdit_jax.seeds import parse_integers
from maskdit_jax.training.cost import cost_of
from maskdit_jax.training.cost_report import (
    CONVENTIONS,
    activation_table,
    check_against_xla,
    compare,
    compared_by_default,
    table,
    to_json,
)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", help="of one run; --config.key=value as in training")
    parser.add_argument(
        "--check", action="store_true", help="compile the step of --config, and let XLA count"
    )
    parser.add_argument("--methods", help="beside the first of them; default: those of MaskDiT's paper")
    parser.add_argument("--size", help="of the methods' networks; default: XL/2")
    parser.add_argument("--image_sizes", help="of the latents; default: 32,64")
    parser.add_argument("--json", type=Path, help="file for the result")
    flags, overrides = parser.parse_known_args()
    with one_line_errors():
        if flags.json and not flags.json.parent.is_dir():
            raise UserError(f"--json={flags.json}: there is no folder {flags.json.parent}")
        lines, result = one_run(flags, overrides) if flags.config else side_by_side(flags, overrides)
        if flags.json:
            flags.json.write_text(json.dumps(result, indent=1))
        print("\n".join(lines))


def one_run(flags: Any, overrides: list[str]) -> tuple[list[str], dict[str, Any]]:
    for name in ("methods", "size", "image_sizes"):
        if getattr(flags, name) is not None:
            raise UserError(f"--{name} is for a comparison of methods, without --config")
    config = resolve(load(flags.config, overrides), device_count=jax.device_count())
    cost = cost_of(config)
    activations, by_preset = activation_table(config)
    lines = [*table(config, cost), *activations]
    result = {"config": flags.config, "overrides": overrides} | to_json(config, cost)
    result["activation_bytes_by_preset"] = by_preset
    if flags.check:
        checked, result["check"] = check_against_xla(config, cost)
        lines += checked
    return [CONVENTIONS, *lines], result


def side_by_side(flags: Any, overrides: list[str]) -> tuple[list[str], dict[str, Any]]:
    if flags.check or overrides:
        raise UserError(f"{(overrides or ['--check'])[0]} needs --config=FILE")
    methods = flags.methods.split(",") if flags.methods else compared_by_default()
    sides = [int(side) for side in parse_integers("--image_sizes", flags.image_sizes or "32,64")]
    lines, costs = compare(methods, flags.size or "XL/2", sides)
    return [CONVENTIONS, *lines], {"costs": costs}


if __name__ == "__main__":
    main()
