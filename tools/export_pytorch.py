"""A checkpoint of a run, or an import → weights for PyTorch, with a card and a config.json."""

from pathlib import Path

from maskdit_jax.api import load
from maskdit_jax.distributed.hosts import check_devices
from maskdit_jax.errors import Parser, one_line_errors
from maskdit_jax.exchange import export_torch
from maskdit_jax.log import log_to_stdout
from maskdit_jax.training.checkpoint import WEIGHTS


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--workdir", required=True, type=Path, help="folder of a run or an import")
    parser.add_argument("--out", required=True, type=Path, help="file .safetensors or .pt in a new folder")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="ema", help="for .safetensors; a .pt file holds both"
    )
    parser.add_argument("--step", type=int, help="of the run's checkpoints; default: the newest")
    flags = parser.parse_args()
    log_to_stdout()
    with one_line_errors():
        check_devices()
        export_torch(load(flags.workdir, flags.weights, step=flags.step, vae=""), flags.out)


if __name__ == "__main__":
    main()
