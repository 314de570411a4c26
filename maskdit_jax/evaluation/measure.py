"""Metrics of a set of samples, in one pass over it."""

from collections.abc import Collection, Iterable, Iterator

import numpy as np

from maskdit_jax.errors import UserError
from maskdit_jax.evaluation.features import Extractor
from maskdit_jax.evaluation.metrics import METRICS
from maskdit_jax.evaluation.reference import Reference

BATCH_SIZE = 256


def measure(
    batches: Iterable[np.ndarray], extractor: Extractor, reference: Reference, names: Collection[str]
) -> dict[str, float]:
    """The METRICS of those names, of samples that come in batches [B, H, W, C], against a reference.

    Memory: 8·D² bytes for each kind of features, and for metrics that do not stream (METRICS[name].streams)
    the pooled features of all samples, 4·D bytes each: 410 MB of 50,000 by Inception.

    Raises:
      UserError: an unknown name; a reference of other features, or without what a metric needs; samples
        that are too few, or not finite.
    """
    reference = _checked(reference, extractor, names)
    chosen = {name: METRICS[name] for name in names}
    collectors = {(m.part, m.collects): m.collects() for m in chosen.values()}
    for batch in batches:
        parts = extractor.extract(batch)
        for (part, _), collector in collectors.items():
            if part not in parts:
                labels = ", ".join(m.label for m in chosen.values() if m.part == part)
                raise UserError(f"{labels}: features by {extractor.name!r} have no {part} part")
            if not np.isfinite(parts[part]).all():
                raise UserError("samples are not finite: have they been made with weights that are?")
            collector.add(parts[part])
    values: dict[str, float] = {}
    # Metrics that come from one computation share it.
    for compute, part, collects in dict.fromkeys((m.compute, m.part, m.collects) for m in chosen.values()):
        values |= compute(collectors[part, collects], reference)
    return {name: values[name] for name in chosen}


def _checked(reference: Reference, extractor: Extractor, names: Collection[str]) -> Reference:
    """The reference with features of its images where they are needed and were not yet made."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"there is no metric {name!r}; known: {', '.join(METRICS)}")
        metric = METRICS[name]
        if metric.compares == "moments" and metric.part not in reference.moments:
            raise UserError(f"{metric.label}: the reference has no statistics of {metric.part} features")
    if any(METRICS[name].compares for name in names):
        reference.check_extractor(extractor)
    needing = [METRICS[name].label for name in names if METRICS[name].compares == "features"]
    if not needing or reference.features is not None:
        return reference
    if reference.images is None:
        raise UserError(
            f"{', '.join(needing)}: the reference has neither features nor images of its own, only "
            "statistics; leave these metrics out, or make one with tools/reference_stats.py"
        )
    features = [extractor.extract(part)["pool"] for part in in_batches(reference.images)]
    return reference._replace(features=np.concatenate(features))


def in_batches(images: np.ndarray, size: int = BATCH_SIZE) -> Iterator[np.ndarray]:
    """Images [n, H, W, C] by so many at a time."""
    for start in range(0, len(images), size):
        yield images[start : start + size]
