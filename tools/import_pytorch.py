"""PyTorch weights of a MaskDiT, DiT or MaskDM → a folder that works like a run's: sample it, tune from it."""

from pathlib import Path

from maskdit_jax.distributed.hosts import check_devices
from maskdit_jax.errors import Parser, one_line_errors
from maskdit_jax.exchange import import_torch
from maskdit_jax.log import log_to_stdout


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--input", required=True, type=Path, help=".safetensors or .pt file")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--model", help="what is expected, such as MaskDiT-XL/2 or DiT-B/4")
    parser.add_argument("--image_size", type=int, help="what is expected, of latents or of images")
    parser.add_argument("--num_classes", type=int, help="what is expected; 0: unconditional")
    parser.add_argument("--num_heads", type=int, help="of the encoder, for a size that is not published")
    parser.add_argument("--decoder_num_heads", type=int, help="of the decoder, likewise")
    flags = vars(parser.parse_args())
    log_to_stdout()
    with one_line_errors():
        check_devices()
        import_torch(flags.pop("input"), flags.pop("out"), **flags)


if __name__ == "__main__":
    main()
