"""The published latents, an LMDB or webdataset tars → a folder of shards to train from (data.source)."""

from pathlib import Path

from maskdit_jax.data.published import INPUTS, READERS, import_latents
from maskdit_jax.errors import Parser, one_line_errors
from maskdit_jax.log import log_to_stdout


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--format", required=True, choices=list(READERS))
    where = "; ".join(f"{name}: {what}" for name, what in INPUTS.items())
    parser.add_argument("--input", required=True, type=Path, help=where)
    parser.add_argument("--out", required=True, type=Path, help="new, or of an interrupted import")
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument("--latent_scale", type=float, default=0.18215, help="for the statistics")
    parser.add_argument(
        "--no_flips", dest="flips", action="store_false", help="the second half are not flips of the first"
    )
    parser.add_argument("--shard_size", type=int, default=4096, help="images per shard")
    flags = vars(parser.parse_args())
    log_to_stdout()
    with one_line_errors():
        import_latents(flags.pop("input"), flags.pop("out"), **flags)


if __name__ == "__main__":
    main()
