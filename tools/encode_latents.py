"""Images → cached moments of the autoencoder, each image with its mirror image. The same command resumes."""

from pathlib import Path

from maskdit_jax.data.encoding import DTYPES, Encoding, encode_images
from maskdit_jax.data.image_sets import open_image_set
from maskdit_jax.data.vae import load_autoencoder
from maskdit_jax.distributed.hosts import check_devices
from maskdit_jax.errors import Parser, UserError, one_line_errors
from maskdit_jax.log import log_to_stdout
from maskdit_jax.models.compute import PRECISIONS


def main() -> None:
    default = Encoding._field_defaults
    parser = Parser(description=__doc__)
    parser.add_argument("--source", required=True, help="tfds:NAME or folder:PATH")
    parser.add_argument("--vae", required=True, help="autoencoder: diffusers folder or .pth file")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--resolution", type=int, default=256, help="pixels per side")
    parser.add_argument("--dtype", choices=DTYPES, default=default["dtype"], help="of the moments")
    parser.add_argument("--precision", choices=PRECISIONS, default="tf32", help="of compute")
    parser.add_argument("--batch_size", type=int, default=default["batch_size"], help="images per call")
    parser.add_argument("--shard_size", type=int, default=default["shard_size"], help="images per file")
    parser.add_argument("--num_threads", type=int, default=default["num_threads"], help="that decode")
    parser.add_argument("--max_corrupt", type=int, default=default["max_corrupt"], help="images to skip")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th shard, for one of N processes")
    flags = parser.parse_args()
    log_to_stdout()
    with one_line_errors():
        check_devices()
        how = {name: getattr(flags, name) for name in Encoding._fields if name != "part"}
        encoding = Encoding(**how, part=_parse_part(flags.part))
        autoencoder = load_autoencoder(flags.vae, flags.precision)
        images = open_image_set(flags.source)
        encode_images(images, autoencoder, flags.out, encoding, source=flags.source)


def _parse_part(text: str) -> tuple[int, int]:
    try:
        index, count = (int(number) for number in text.split("/"))
    except ValueError:
        raise UserError(f"--part={text}: expected I/N such as 0/4") from None
    return index, count


if __name__ == "__main__":
    main()
