"""Command: metrics of a set of samples against a reference, as a card (JSON, lines, and a picture).

One process measures, on all devices that it has; it needs no run folder, only the samples.

Exit codes: 0 done, or certified; 1 numbers that differ from the published ones; 2 an error of one line.
"""

import sys
from pathlib import Path

from maskdit_jax.distributed.hosts import check_devices
from maskdit_jax.errors import Parser, UserError, one_line_errors
from maskdit_jax.evaluation import certify
from maskdit_jax.evaluation.features import inception
from maskdit_jax.evaluation.metrics import METRICS
from maskdit_jax.evaluation.sample_card import describe, evaluate_samples
from maskdit_jax.evaluation.sample_set import ABOUT
from maskdit_jax.interop.inception import WHERE
from maskdit_jax.log import log, log_to_stdout
from maskdit_jax.program_cache import keep_programs

MAX_BATCH_SIZE = 2**12


def main(arguments: list[str] | None = None) -> None:
    """Parse flags; measure, or certify the evaluator."""
    parser = Parser("python -m maskdit_jax.evaluate", description=__doc__)
    parser.add_argument("--samples", help="folder that `sample` wrote, .npz with arr_0, or folder of images")
    parser.add_argument(
        "--reference", help="statistics of real images: tools/reference_stats.py, ADM's, EDM's"
    )
    parser.add_argument("--inception", help="weights of Inception-v3, .pth or .safetensors")
    parser.add_argument("--features", help=".npz with features [n, D] of the samples, of any other network")
    parser.add_argument("--metrics", help=f"of {','.join(METRICS)}; default: all that the reference allows")
    parser.add_argument("--num_samples", type=int, help="measure the first so many")
    parser.add_argument("--images", help="real images to show neighbours of, where the reference keeps none")
    parser.add_argument("--batch_size", type=int, default=32, help="images of one call on each device")
    parser.add_argument(
        "--out", type=Path, help="where to write the card; default: card.json with the samples"
    )
    parser.add_argument(
        "--certify", help="folder with ADM's published batches: compare with published numbers"
    )
    flags = parser.parse_args(arguments)
    log_to_stdout()
    keep_programs()
    with one_line_errors():
        check_devices()
        if not 1 <= flags.batch_size <= MAX_BATCH_SIZE:
            raise UserError(f"--batch_size={flags.batch_size}: expected 1 … {MAX_BATCH_SIZE:,}")
        if flags.certify is not None:
            sys.exit(_certify(flags.certify, flags.inception, flags.batch_size))
        source = flags.samples or flags.features
        if source is None or flags.reference is None:
            raise UserError(
                "expected --samples=OUT (or --features=FILE.npz) and --reference=REF.npz, or --certify"
            )
        out = flags.out or default_card(Path(source))
        card = evaluate_samples(
            flags.samples,
            flags.reference,
            inception=flags.inception,
            features=flags.features,
            metrics=flags.metrics.split(",") if flags.metrics is not None else None,
            num_samples=flags.num_samples,
            images=flags.images,
            batch_size=flags.batch_size,
            out=out,
        )
        picture = f" and {card['picture']}" if card["picture"] else ""
        log.info(f"{describe(card)}\nwrote {out}{picture}")


def default_card(samples: Path) -> Path:
    """In the folder that `sample` wrote; beside other samples, as their images are not to become more."""
    folder = samples if samples.is_dir() else samples.parent
    return (
        folder / "card.json" if (folder / ABOUT).exists() else samples.with_name(f"{samples.stem}_card.json")
    )


def _certify(folder: str, weights: str | None, batch_size: int) -> int:
    certify.check_folder(Path(folder))  # before a network is built
    if weights is None:
        raise UserError(f"--certify needs --inception=FILE. {WHERE}")
    rows = certify.certify(folder, inception(weights, batch_size), batch_size)
    agrees = all(row.agrees for row in rows)
    log.info(f"{certify.describe(rows)}\n{'certified' if agrees else 'not certified: numbers differ'}")
    return 0 if agrees else 1


if __name__ == "__main__":
    main()
