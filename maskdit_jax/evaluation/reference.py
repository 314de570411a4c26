"""What samples are compared with: statistics of real images, and some of these images, in one npz file.

Written and read in ADM's layout: mu, sigma of the pooled features and mu_s, sigma_s of the spatial ones,
arr_0 images; EDM's files hold the first two alone. Ours have besides `features`, those of the images in
arr_0, and `about`, a JSON text that says how they were made.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskdit_jax.errors import UserError, shown
from maskdit_jax.evaluation.features import Extractor
from maskdit_jax.evaluation.metrics import MAX_SIZE, Moments
from maskdit_jax.evaluation.npz import Npz
from maskdit_jax.files import appears_whole

# Names of the mean and of the covariance in the files, by the part of the features.
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
INCEPTION_SIZES = {"pool": 2048, "spatial": 2023}
MAX_ABOUT = 10_000  # characters


class Reference(NamedTuple):
    """Statistics of real images.

    count: images behind them, None where the file does not say. extractor, extractor_digest: what made the
    features, "" where the file does not say. moments: mean [D] and covariance [D, D], float64, by part.
    features [m, D] float32: pooled features of some of the images; images [m, H, W, C] uint8: these images;
    either may be None. digest: sha256 of the file, "" before there is one. origin: where the images are from.
    """

    count: int | None  # type: ignore[assignment]  # tuple.count, which nobody misses
    extractor: str
    extractor_digest: str
    moments: dict[str, tuple[np.ndarray, np.ndarray]]
    features: np.ndarray | None
    images: np.ndarray | None
    digest: str
    origin: str

    def check_extractor(self, extractor: Extractor) -> None:
        """Compare what made the features with what will make those of the samples.

        Raises:
          UserError: they differ.
        """
        here, there = extractor.name, self.extractor
        if there and here != there:
            raise UserError(f"the reference has features by {there!r}, the samples get them by {here!r}")
        if self.extractor_digest and self.extractor_digest != extractor.digest:
            raise UserError(
                f"the reference was made with other weights of {here!r}, of sha256 "
                f"{self.extractor_digest[:12]}…; these have {extractor.digest[:12] or 'none'}…"
            )


def make_reference(
    batches: Iterable[np.ndarray],
    count: int,
    extractor: Extractor,
    *,
    num_kept: int = 10_000,
    seed: int = 0,
    origin: str = "",
) -> Reference:
    """The reference of `count` images that come in batches [B, H, W, C], in one pass.

    num_kept: so many of the images, drawn by the seed, are kept with their features: memory grows with
    these alone.

    Raises:
      UserError: other than `count` images come, or fewer than 2.
    """
    drawn = np.random.default_rng(seed).choice(count, min(num_kept, count), replace=False)
    is_kept = np.isin(np.arange(count), drawn)
    moments: dict[str, Moments] = {}
    features, images, done = [], [], 0
    for batch in batches:
        parts = extractor.extract(batch)
        for part in STATISTICS.keys() & parts.keys():
            moments.setdefault(part, Moments()).add(parts[part])
        kept = is_kept[done : done + len(batch)]
        features.append(parts["pool"][: len(kept)][kept])
        images.append(batch[: len(kept)][kept])
        done += len(batch)
    if done != count:
        raise UserError(f"{done:,} images came, expected {count:,}")
    kept_images = np.concatenate(images)
    return Reference(
        count=count,
        extractor=extractor.name,
        extractor_digest=extractor.digest,
        moments={part: (m.mean, m.cov) for part, m in moments.items()},
        features=np.concatenate(features).astype(np.float32) if num_kept else None,
        images=kept_images if num_kept and kept_images.dtype == np.uint8 else None,
        digest="",
        origin=origin,
    )


def write_reference(path: Path, reference: Reference) -> None:
    """Write a reference as an npz file, which appears whole."""
    about = {name: getattr(reference, name) for name in ("count", "extractor", "extractor_digest", "origin")}
    arrays: dict[str, Any] = {"about": np.array(json.dumps(about))}
    for part, statistics in reference.moments.items():
        arrays |= dict(zip(STATISTICS[part], statistics))
    arrays |= {} if reference.features is None else {"features": reference.features}
    arrays |= {} if reference.images is None else {"arr_0": reference.images}
    with appears_whole(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def read_reference(path: str | Path) -> Reference:
    """A reference of ours, ADM's (mu sigma mu_s sigma_s, arr_0) or EDM's (mu sigma).

    Raises:
      UserError: no such file, or it is damaged, or holds anything else under these names.
    """
    file = Npz(Path(path))
    about = _read_about(file)
    moments = {
        part: _read_moments(file, *names) for part, names in STATISTICS.items() if names[0] in file.members
    }
    if "pool" not in moments:
        raise UserError(f"{path} is no reference: it has no mu and sigma; tools/reference_stats.py makes one")
    features = _read_features(file, len(moments["pool"][0])) if "features" in file.members else None
    images = _read_images(file) if "arr_0" in file.members else None
    if features is not None and images is not None and len(features) != len(images):
        raise UserError(f"{path} is damaged: features of {len(features)} images beside {len(images)} images")
    sizes = {part: len(mean) for part, (mean, _) in moments.items()}
    inception = all(sizes[part] == INCEPTION_SIZES[part] for part in sizes)
    with Path(path).open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    default = {
        "count": None,
        "extractor": "inception" * inception,
        "extractor_digest": "",
        "origin": str(path),
    }
    return Reference(moments=moments, features=features, images=images, digest=digest, **default | about)


def _read_about(file: Npz) -> dict[str, Any]:
    if "about" not in file.members:
        return {}
    shape, dtype, _ = file.members["about"]
    if shape or dtype.kind != "U" or dtype.itemsize > 4 * MAX_ABOUT:
        raise UserError(f"{file.path} is damaged: `about` is no short text")
    try:
        about = json.loads(str(file.read("about")))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.path} is damaged: `about` is no JSON") from error
    kinds = {"count": int, "extractor": str, "extractor_digest": str, "origin": str}
    if not isinstance(about, dict) or any(type(about.get(name)) is not kind for name, kind in kinds.items()):
        raise UserError(f"{file.path} is damaged: `about` lacks one of {', '.join(kinds)}")
    if not 2 <= about["count"] < 2**63:
        raise UserError(f"{file.path} is damaged: statistics of {shown(about['count'])} images")
    return {name: about[name] for name in kinds}


def _read_moments(file: Npz, *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D], float64."""
    for name in names:
        if name not in file.members:
            raise UserError(f"{file.path} is no reference: it has {names[0]}, but no {name}")
    (shape, dtype, _), (square, square_dtype, _) = (file.members[name] for name in names)
    size = shape[0] if len(shape) == 1 else 0
    if dtype.kind != "f" or square_dtype.kind != "f" or not 0 < size <= MAX_SIZE or square != (size, size):
        raise UserError(
            f"{file.path} is no reference: {names[0]} {shown(list(shape))} {dtype} and {names[1]} "
            f"{shown(list(square))} {square_dtype}, expected [D] and [D, D] of floats, D at most {MAX_SIZE:,}"
        )
    mean, cov = (file.read(name).astype(np.float64) for name in names)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise UserError(f"{file.path} is damaged: {names[0]} or {names[1]} holds values that are not finite")
    if not np.allclose(cov, cov.T, rtol=1e-4, atol=1e-6 * np.abs(cov).max()) or (cov.diagonal() < 0).any():
        raise UserError(
            f"{file.path} is damaged: {names[1]} is no covariance, it is not symmetric or negative"
        )
    return mean, cov


def _read_features(file: Npz, size: int) -> np.ndarray:
    shape, dtype, _ = file.members["features"]
    if dtype != np.float32 or len(shape) != 2 or shape[1] != size or not shape[0]:
        raise UserError(
            f"{file.path} is damaged: features {shown(list(shape))} {dtype}, expected [m, {size}] float32"
        )
    features = file.read("features")
    if not np.isfinite(features).all():
        raise UserError(f"{file.path} is damaged: features holds values that are not finite")
    return features


def _read_images(file: Npz) -> np.ndarray:
    shape, dtype, _ = file.members["arr_0"]
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not all(shape):
        raise UserError(
            f"{file.path} is damaged: arr_0 {shown(list(shape))} {dtype}, expected uint8 [m, H, W, 1 or 3]"
        )
    return file.read("arr_0")
