"""Command: train what a configuration describes. The same command again resumes."""

from pathlib import Path

import jax

from maskdit_jax.config import load, resolve
from maskdit_jax.errors import Parser, one_line_errors
from maskdit_jax.evaluation.card import finish
from maskdit_jax.training.loop import train
from maskdit_jax.training.report import log_to_stdout


def main(arguments: list[str] | None = None) -> None:
    """Parse flags, train, finish."""
    parser = Parser("python -m maskdit_jax.main", description=__doc__)
    parser.add_argument("--config", required=True, help="file such as configs/digits.py")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.epilog = "--config.section.key=value overrides an option; configs/base.py lists them all."
    flags, overrides = parser.parse_known_args(arguments)
    log_to_stdout()
    with one_line_errors():
        config = resolve(load(flags.config, overrides), device_count=jax.device_count())
        train(config, flags.workdir)
        finish(flags.workdir)


if __name__ == "__main__":
    main()
