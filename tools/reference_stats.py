"""Images → a reference for `evaluate`, and for measurements during training: statistics, and some images."""

from pathlib import Path

from maskdit_jax.config import FEATURES
from maskdit_jax.distributed.hosts import check_devices
from maskdit_jax.errors import Parser, one_line_errors
from maskdit_jax.evaluation.reference_stats import save_reference
from maskdit_jax.log import log_to_stdout


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="file to write, such as digits.npz")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--source", default="", help="digits, folder:PATH, tfds:NAME or latents:FOLDER")
    group.add_argument("--images", default="", help="folder of images of one size, or .npz with arr_0")
    parser.add_argument("--image_size", type=int, default=0, help="folder: and tfds: are cropped to it")
    parser.add_argument("--vae", default="", help="autoencoder that makes images of latents:")
    parser.add_argument("--held_out", action="store_true", help="of digits those that no run trains on")
    parser.add_argument("--features", choices=FEATURES, default="inception", help="that are compared")
    parser.add_argument("--inception", default="", metavar="FILE", help="weights, for --features=inception")
    parser.add_argument("--num_kept", type=int, default=10_000, help="images kept with their features")
    parser.add_argument("--seed", type=int, default=0, help="by which these are drawn")
    parser.add_argument("--num_threads", type=int, default=4, help="that read")
    flags = parser.parse_args()
    log_to_stdout()
    with one_line_errors():
        check_devices()
        save_reference(**vars(flags))


if __name__ == "__main__":
    main()
