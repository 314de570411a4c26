"""The card of a set of samples: what was measured, of what, how; as JSON, as lines, and as a picture."""

import dataclasses
import json
import platform
import time
from collections.abc import Collection, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import maskdit_jax
from maskdit_jax.data.images import contact_sheet, save_png
from maskdit_jax.diffusion.solvers import SamplerOptions
from maskdit_jax.errors import UserError, known, printable, shown
from maskdit_jax.evaluation.features import LATENTS, PIXELS, Extractor, inception
from maskdit_jax.evaluation.manifold import nearest
from maskdit_jax.evaluation.measure import in_batches, measure
from maskdit_jax.evaluation.metrics import METRICS
from maskdit_jax.evaluation.npz import Npz
from maskdit_jax.evaluation.reference import Reference, make_reference, read_reference
from maskdit_jax.evaluation.sample_set import SampleSet, open_features, open_samples
from maskdit_jax.files import appears_whole
from maskdit_jax.interop.inception import SHA256, WHERE
from maskdit_jax.log import duration, log

USUAL_SAMPLES, USUAL_KEPT = 50_000, 10_000
FEW_REAL = 10_000
PAIRS, PAIRS_PER_ROW = 32, 4  # of the picture
PROGRESS_S = 10
NEIGHBOURS_FROM = 1000  # real images whose features are made for the picture alone
WITHOUT_WEIGHTS = {extractor.name: extractor for extractor in (PIXELS, LATENTS)}

# Of samples.json, in the order of the lines; and of its sampler, even where nothing is unusual.
ALWAYS_SAID = ("solver", "num_steps", "cfg_scale", "guidance_interval")
SAID = ("seeds", "labels", "nfe", "workdir", "step", "weights", "weights_digest", "weak", "precision")


def evaluate_samples(
    samples: str | Path | None,
    reference: str | Path,
    *,
    inception: str | Path | None = None,
    features: str | Path | None = None,
    metrics: Collection[str] | None = None,
    num_samples: int | None = None,
    images: str | Path | None = None,
    batch_size: int = 32,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measure a set of samples against a reference; the card.

    Args:
      samples: what `sample` wrote, an ADM .npz, or a folder of images (evaluation/sample_set.py); None where
        `features` stand for it.
      reference: a .npz of ours, ADM's or EDM's (evaluation/reference.py). With `features` it may be
        features too.
      inception: weights of Inception, for references with its features. A reference of pixels needs none.
      features: a .npz with features [n, D] of the samples, made by any other network.
      metrics: names in METRICS; by default all that the features and the reference allow.
      num_samples: measure the first so many.
      images: real images for the picture of nearest neighbours, where the reference has kept none.
      batch_size: images of one call on each device.
      out: where to write the card, a .json; the picture gets its name with .png.

    Raises:
      UserError: something is missing, damaged, or of other features than the reference's.
    """
    if samples is None and features is None:
        raise UserError("samples or features are needed: what shall be evaluated?")
    sample_set = None if samples is None else open_samples(samples, num_samples)
    if features is not None:
        given = open_features(features, num_samples)
        if sample_set is not None and sample_set.count != given.count:
            raise UserError(
                f"{features} has features of {given.count:,} samples, {samples} has {sample_set.count:,}"
            )
        target = _reference_for_features(Path(reference))
        # Of what others have made nobody can say whether it is the reference's: its size must do.
        extractor = Extractor(target.extractor, target.extractor_digest, _flat)
        network, digest = "features", given.sha256()
    else:
        assert sample_set is not None
        given, target = sample_set, read_reference(reference)
        extractor = choose_extractor(target, inception, batch_size)
        network, digest = extractor.name, extractor.digest
    names = _choose_metrics(metrics, extractor, target)
    extractor = _same_size(extractor, target)
    target = with_features(target, extractor, names)
    batches = with_progress(given.read(batch_size * jax.device_count()), given.count, "samples")
    values = measure(batches, extractor, target, names)
    card: dict[str, Any] = {
        "format": 1,
        "metrics": {metric_label(name, given.count, network): values[name] for name in names},
        "num_samples": given.count,
        "samples": {"path": str(samples or features)} | (sample_set.about if sample_set is not None else {}),
        "extractor": {
            "name": network if features is None else f"{network} of {features}",
            "sha256": digest,
        },
        "reference": {
            "path": str(reference),
            "sha256": target.digest,
            "count": target.count,
            "kept": _num_kept(target),
            "origin": target.origin,
        },
        "warnings": _warnings(given, sample_set, target, extractor, names),
        "versions": {name: version(name) for name in ("jax", "flax", "numpy")}
        | {"maskdit_jax": maskdit_jax.__version__, "python": platform.python_version()},
    }
    if out is not None:
        picture = _picture(sample_set, extractor, target, images, features is not None)
        _write(card, Path(out), picture)
    return card


def choose_extractor(reference: Reference, weights: str | Path | None, batch_size: int) -> Extractor:
    """What makes features of samples like those of the reference.

    Raises:
      UserError: that needs weights that were not given.
    """
    if weights is not None:
        return inception(weights, batch_size)
    if reference.extractor in WITHOUT_WEIGHTS:
        return WITHOUT_WEIGHTS[reference.extractor]
    if reference.extractor in ("", "inception"):
        raise UserError(f"the reference needs features by Inception. {WHERE}")
    raise UserError(f"the reference has features by {shown(reference.extractor)}: give --features=FILE.npz")


def _same_size(extractor: Extractor, reference: Reference) -> Extractor:
    """The extractor, which refuses features of another size than the reference's."""

    def extract(images: np.ndarray) -> dict[str, np.ndarray]:
        parts = extractor.extract(images)
        for part, (mean, _) in reference.moments.items():
            if part in parts and parts[part].shape[1] != len(mean):
                raise UserError(
                    f"samples {_by(images.shape[1:])} have {parts[part].shape[1]:,} features by "
                    f"{extractor.name!r}, the reference's are {len(mean):,}: of another size or network?"
                )
        return parts

    return extractor._replace(extract=extract)


def _flat(x: np.ndarray) -> dict[str, np.ndarray]:
    return {"pool": x.reshape(len(x), -1)}


def _reference_for_features(path: Path) -> Reference:
    with Npz(path) as file:
        has_statistics = "mu" in file.members
    if has_statistics:
        return read_reference(path)
    real = open_features(path)
    made = make_reference(
        real.read(USUAL_KEPT), real.count, Extractor("features", "", _flat), origin=str(path)
    )
    return made._replace(digest=real.sha256())


def _choose_metrics(asked: Collection[str] | None, extractor: Extractor, reference: Reference) -> list[str]:
    for name in asked or ():
        if name not in METRICS:
            raise UserError(f"metric {shown(name)} is unknown; known: {known(name, METRICS, len(METRICS))}")
    if asked is not None:
        return list(dict.fromkeys(asked))
    has_images = reference.features is not None or reference.images is not None
    possible = {"moments": reference.moments.keys(), "features": ["pool"] * has_images}
    return [
        name
        for name, metric in METRICS.items()
        if metric.part in extractor.parts and metric.part in possible.get(metric.compares, [metric.part])
    ]


def metric_label(name: str, count: int, extractor: str) -> str:
    """Such as FID-50k, FID-1437 or FID-500 (pixels): of another count, or of other features than Inception's,
    it is another number."""
    thousands = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    return f"{METRICS[name].label}-{thousands}" + f" ({extractor})" * (extractor != "inception")


def with_progress(batches: Iterable[np.ndarray], count: int, what: str) -> Iterator[np.ndarray]:
    """The batches of `count` items; now and then the log says how many there were, and the time left."""
    done, started = 0, time.monotonic()
    said = started
    for batch in batches:
        yield batch
        done += len(batch)
        now = time.monotonic()
        if now - said > PROGRESS_S:
            said = now
            left = duration((now - started) / done * (count - done))
            log.info(f"{done:,}/{count:,} {what}, {left} left")


def with_features(reference: Reference, extractor: Extractor, metrics: Collection[str]) -> Reference:
    """The reference, with features of its images where these metrics need them and it has none."""
    needed = any(METRICS[name].compares == "features" for name in metrics)
    if not needed or reference.features is not None or reference.images is None:
        return reference
    return reference._replace(features=_features_of(reference.images, extractor))


def _features_of(images: np.ndarray, extractor: Extractor) -> np.ndarray:
    batches = with_progress(in_batches(images), len(images), "real images")
    return np.concatenate([extractor.extract(batch)["pool"] for batch in batches])


def _num_kept(reference: Reference) -> int:
    kept = reference.images if reference.features is None else reference.features
    return 0 if kept is None else len(kept)


def _warnings(
    given: SampleSet,
    sample_set: SampleSet | None,
    reference: Reference,
    extractor: Extractor,
    names: Collection[str],
) -> list[str]:
    """What a reader who compares the card with published ones should know."""
    said = []
    if given.count != USUAL_SAMPLES:
        said.append(
            f"{given.count:,} samples: published numbers are of {USUAL_SAMPLES:,}; with fewer, FID is larger"
        )
    if reference.count is not None and reference.count < FEW_REAL:
        said.append(
            f"the reference is of {reference.count:,} real images: published ones are of all there are"
        )
    kept = _num_kept(reference)
    neighbours = [METRICS[name].label for name in names if METRICS[name].compares == "features"]
    if neighbours and kept != USUAL_KEPT:
        said.append(f"{', '.join(neighbours)} against {kept:,} real images: customary are {USUAL_KEPT:,}")
    if sample_set is not None and not sample_set.about:
        said.append("no samples.json: seeds, labels, guidance, solver and weights of the samples are unknown")
    if extractor.name == "inception" and extractor.digest not in ("", SHA256):
        said.append(f"the weights of Inception have sha256 {extractor.digest}, not the published {SHA256}")
    if sample_set is not None and reference.images is not None:
        ours, theirs = sample_set.image_shape, reference.images.shape[1:]
        if ours != theirs:
            said.append(f"samples are {_by(ours)}, images of the reference {_by(theirs)}: not the same task")
    return said


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _picture(
    samples: SampleSet | None,
    extractor: Extractor,
    reference: Reference,
    images: str | Path | None,
    features_given: bool,
) -> np.ndarray | None:
    """The first samples, each beside the real image that is nearest to it by its features, uint8.

    Without real images the samples alone; None where they are no images.
    """
    if samples is None or samples.dtype != np.uint8:
        return None
    first = next(samples.read(PAIRS))
    if features_given:  # of the network nothing is here but these
        return contact_sheet(first, PAIRS_PER_ROW * 2)
    real, real_features = reference.images, reference.features
    if real is None and images is not None:
        count = min(open_samples(images).count, NEIGHBOURS_FROM)
        real, real_features = np.concatenate(list(open_samples(images, count).read(count))), None
    if real is None:
        log.info("no real images to look for neighbours in: --images=FOLDER gives some")
        return contact_sheet(first, PAIRS_PER_ROW * 2)
    if real_features is None:
        real = real[:NEIGHBOURS_FROM]
        real_features = _features_of(real, extractor)
    _, places = nearest(extractor.extract(first)["pool"], real_features)
    pairs = [image for i, place in enumerate(places) for image in (first[i], _like(real[place], first[i]))]
    return contact_sheet(np.stack(pairs), PAIRS_PER_ROW * 2)


def _like(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """An image with the shape of another, for a picture of both."""
    if image.shape[:2] != other.shape[:2]:
        from PIL import Image

        resized = Image.fromarray(image.squeeze()).resize((other.shape[1], other.shape[0]))
        image = np.asarray(resized).reshape(*other.shape[:2], -1)
    return np.broadcast_to(image, other.shape) if other.shape[2] == 3 else image[..., :1]


def _write(card: dict[str, Any], out: Path, picture: np.ndarray | None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    card["picture"] = None
    if picture is not None:
        card["picture"] = str(out.with_suffix(".png"))
        save_png(out.with_suffix(".png"), picture)
    with appears_whole(out) as partial:
        partial.write_text(json.dumps(card, indent=1))


def describe(card: dict[str, Any]) -> str:
    """The card as lines for a person."""
    about, sampler = card["samples"], card["samples"].get("sampler")
    rows: list[tuple[str, Any]] = [*((name, f"{value:.4f}") for name, value in card["metrics"].items())]
    rows.append(("samples", f"{card['num_samples']:,} of {about['path']}"))
    rows += [(name, about[name]) for name in SAID if about.get(name) is not None]
    if isinstance(sampler, dict):
        usual = dataclasses.asdict(SamplerOptions())
        told = {k: v for k, v in sampler.items() if k in ALWAYS_SAID or v != usual.get(k)}
        rows.append(("sampler", ", ".join(f"{name}={value}" for name, value in told.items())))
    extractor, reference = card["extractor"], card["reference"]
    rows.append(("features", f"{extractor['name']} {extractor['sha256'][:12]}"))
    count = "?" if reference["count"] is None else f"{reference['count']:,}"
    rows.append(("reference", f"{reference['path']} {reference['sha256'][:12]}, {count} images"))
    rows.append(("versions", ", ".join(f"{name} {value}" for name, value in card["versions"].items())))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {shown(value, 200)}" for name, value in rows]
    return "\n".join(["card", *lines, *(f"  warning: {printable(text)}" for text in card["warnings"])])
