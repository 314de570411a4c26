"""What a run will need, checked before it starts: packages, devices, processes, data, disk.

With several processes each runs the same command, with the flags that it will have in the run.
"""

import sys
from pathlib import Path

try:
    from maskdit_jax.distributed.hosts import add_flags
    from maskdit_jax.doctor import diagnose
    from maskdit_jax.errors import Parser
    from maskdit_jax.log import log_to_stdout
except ModuleNotFoundError as error:
    sys.exit(f"FAILED  packages: {error.name} is not installed; pip install -e . in the repository")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--config", help="file such as configs/digits.py; default: no configuration is checked"
    )
    parser.add_argument("--workdir", type=Path, help="folder of the run; default: no folder is checked")
    add_flags(parser)
    parser.set_defaults(connect_timeout=60)
    parser.epilog = "--config.section.key=value overrides an option of the configuration."
    flags, overrides = parser.parse_known_args()
    if overrides and not flags.config:
        parser.error(f"unknown flag {overrides[0]}")
    log_to_stdout()
    diagnose(flags, overrides)


if __name__ == "__main__":
    main()
