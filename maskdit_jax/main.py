"""Command: train what a configuration describes. The same command again resumes.

Exit codes: 0 finished, 2 an error of one line, 75 saved after SIGTERM or Ctrl-C, 76 another process of the
run was lost; after 75 and 76 the same command goes on.
"""

from pathlib import Path

from maskdit_jax.config import described
from maskdit_jax.config_file import load
from maskdit_jax.distributed.hosts import add_flags, joined
from maskdit_jax.errors import Parser, one_line_errors
from maskdit_jax.log import log_to_stdout
from maskdit_jax.run import train


def main(arguments: list[str] | None = None) -> None:
    """Parse flags, train, finish."""
    parser = Parser("python -m maskdit_jax.main", description=__doc__)
    parser.add_argument("--config", required=True, help="file, or a recipe such as digits")
    parser.add_argument("--workdir", type=Path, help="folder of the run")
    parser.add_argument("--list_options", action="store_true", help="list the options of --config, and end")
    parser.add_argument(
        "--allow_changes", action="store_true", help="go on with options that make it another run"
    )
    add_flags(parser)
    parser.epilog = (
        "--config.section.key=value overrides an option. --config=digits --list_options lists all options of "
        "a recipe with their values, units and ranges."
    )
    flags, overrides = parser.parse_known_args(arguments)
    log_to_stdout()
    if flags.list_options:
        with one_line_errors():
            print("\n".join(described(load(flags.config, overrides))))
        return
    if flags.workdir is None:
        parser.error("the following arguments are required: --workdir")
    with joined(flags) as peers:
        config = load(flags.config, overrides)
        train(config, flags.workdir, allow_changes=flags.allow_changes, peers=peers)


if __name__ == "__main__":
    main()
