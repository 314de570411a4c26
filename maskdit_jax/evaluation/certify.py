"""The evaluator against published numbers: ADM's own batches, as its authors offer them for download."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from maskdit_jax.errors import UserError
from maskdit_jax.evaluation.features import Extractor
from maskdit_jax.evaluation.measure import measure
from maskdit_jax.evaluation.metrics import METRICS
from maskdit_jax.evaluation.reference import read_reference
from maskdit_jax.evaluation.sample_card import with_features, with_progress
from maskdit_jax.evaluation.sample_set import open_samples

REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
SAMPLES = "admnet_guided_upsampled_imagenet256.npz"
WHERE = (
    "the page evaluations of github.com/openai/guided-diffusion (files at "
    "openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256)"
)


class Published(NamedTuple):
    """A published value, and how far from it the evaluator may be."""

    value: float
    tolerance: float


# Of ADM-G with upsampling on ImageNet 256 (arXiv 2105.05233, by its authors' evaluator). Precision and recall
# were computed there from distances in half precision, which moves them by up to 0.005 from those in float32,
# computed here: their fourth digit is no fact about the samples.
PUBLISHED = {
    "inception_score": Published(215.8370, 0.05),
    "fid": Published(3.94256, 0.005),
    "sfid": Published(6.14043, 0.01),
    "precision": Published(0.8265, 0.005),
    "recall": Published(0.5309, 0.005),
}


class Row(NamedTuple):
    """One metric, measured beside its published value."""

    name: str
    measured: float
    published: Published

    @property
    def agrees(self) -> bool:
        """Written so that NaN does not."""
        return abs(self.measured - self.published.value) <= self.published.tolerance


def certify(
    folder: str | Path,
    extractor: Extractor,
    batch_size: int = 32,
    published: Mapping[str, Published] = PUBLISHED,
) -> list[Row]:
    """Measure the samples of a folder against the reference beside them.

    Args:
      folder: holds REFERENCE and SAMPLES, under their published names.
      extractor: Inception, with the published weights.
      batch_size: images of one call on each device.
      published: what is expected of them, by name in METRICS.

    Raises:
      UserError: one of the files is missing (the message says where it is to be had), or damaged.
    """
    check_folder(Path(folder))
    samples, reference = open_samples(Path(folder) / SAMPLES), read_reference(Path(folder) / REFERENCE)
    reference = with_features(reference, extractor, published.keys())
    batches = with_progress(samples.read(batch_size * jax.device_count()), samples.count, "samples")
    values = measure(batches, extractor, reference, list(published))
    return [Row(name, values[name], expected) for name, expected in published.items()]


def check_folder(folder: Path) -> None:
    """Raise a UserError where one of the published files is missing."""
    missing = [name for name in (REFERENCE, SAMPLES) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {' and '.join(missing)}, to be had from {WHERE}")


def describe(rows: list[Row]) -> str:
    """The comparison as lines for a person."""
    columns = "{:<10}{:>12}{:>12}{:>12}{:>10}{}"
    lines = [columns.format("", "measured", "published", "difference", "allowed", "")]
    for row in rows:
        value, tolerance = row.published
        numbers = (f"{row.measured:.5f}", f"{value:.5f}", f"{row.measured - value:+.5f}", f"{tolerance:g}")
        verdict = "" if row.agrees else "  differs"
        lines.append(columns.format(METRICS[row.name].label, *numbers, verdict))
    if any(row.name in ("precision", "recall") for row in rows):
        lines.append("precision and recall were published from distances in half precision; here in float32")
    return "\n".join(lines)
