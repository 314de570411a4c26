"""Cached autoencoder moments on disk.

A folder of moments holds pairs of .npy files, shards of some thousand images, with a checksum beside
each, `metadata.json`, which lists them, and `stats.json`. To open one with numpy alone:

    meta = json.load(open("metadata.json"))
    name = meta["shards"][0]["name"]
    labels = np.load(f"{name}.labels.npy")                     # [n]
    moments = np.load(f"{name}.moments.npy", mmap_mode="r")    # [n, views, H, W, (mean, logvar)]
    moments[7, 1]    # of image 7 the mirror image; view 0 is the image itself
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskdit_jax.data.latents import LOGVAR_RANGE
from maskdit_jax.errors import UserError
from maskdit_jax.files import appears_whole

METADATA, STATS = "metadata.json", "stats.json"


class Shard(NamedTuple):
    """moments [n, views, H, W, 2C], memory-mapped; labels [n] int32."""

    moments: np.ndarray
    labels: np.ndarray


def shard_names(count: int) -> list[str]:
    """Names of the shards of a folder that has `count` of them."""
    return [f"shard-{i:05d}-of-{count:05d}" for i in range(count)]


def write_shard(
    folder: Path, name: str, moments: np.ndarray, labels: np.ndarray, *, skipped: Sequence[str] = ()
) -> None:
    """Write one shard: moments [n, views, H, W, 2C] float16 or float32, labels [n]; -1 = no class.

    Its report, with checksums, statistics and the names of images `skipped`, comes last: a shard
    that has one is complete.
    """
    labels = np.asarray(labels, np.int32)
    report = {
        "name": name,
        "num_records": len(labels),
        "skipped": list(skipped),
        "sha256": {},
        "statistics": _statistics(moments, labels),
    }
    for part, array in (("moments", moments), ("labels", labels)):
        file = folder / f"{name}.{part}.npy"
        with appears_whole(file) as partial, partial.open("wb") as out:
            np.save(out, np.ascontiguousarray(array))
        report["sha256"][part] = _sha256(file)
    with appears_whole(folder / f"{name}.json") as partial:
        partial.write_text(json.dumps(report))


def read_report(folder: Path, name: str, verify: bool = True) -> dict[str, Any] | None:
    """The report of a shard; None when it is incomplete or its files are not those that were written.

    Without `verify` the files themselves are not read.
    """
    try:
        report = json.loads((folder / f"{name}.json").read_text())
        parts = report["sha256"].items() if verify else ()
        sound = all(_sha256(folder / f"{name}.{part}.npy") == sha for part, sha in parts)
    except (OSError, ValueError, KeyError):
        return None
    return report if sound else None


def finish_shards(
    folder: Path,
    reports: list[dict[str, Any]],
    *,
    num_classes: int,
    latent_scale: float,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Write `stats.json` and then `metadata.json`, which makes the folder a data set; the statistics.

    `about` says where the moments are from; it stands in both files. Empty shards are left out.
    """
    reports = [report for report in reports if report["num_records"]]
    if not reports:
        raise UserError(f"{folder}: no image could be read, so there is no data set")
    total = {
        name: np.sum([report["statistics"][name] for report in reports], axis=0)
        for name in ("values", "sum", "sum_of_squares")
    }
    count_per_class: dict[str, int] = {}
    for report in reports:
        for label, count in report["statistics"]["count_per_class"].items():
            count_per_class[label] = count_per_class.get(label, 0) + count
    mean = total["sum"] / total["values"]
    second = total["sum_of_squares"] / total["values"]
    stats = {
        "num_images": sum(report["num_records"] for report in reports),
        "count_per_class": dict(sorted(count_per_class.items(), key=lambda item: int(item[0]))),
        "latent_scale": latent_scale,
        "latents_mean": (latent_scale * mean).tolist(),
        "latents_std": (latent_scale * np.sqrt(second - mean**2)).tolist(),
        "latents_rms": float(latent_scale * np.sqrt(second.mean())),
        "raw_latents_rms": float(np.sqrt(second.mean())),
        "skipped": [name for report in reports for name in report["skipped"]],
        **about,
    }
    moments = _load(folder / f"{reports[0]['name']}.moments.npy")
    _, views, image_size, _, channels2 = moments.shape
    metadata = {
        "image_size": image_size,
        "channels": channels2 // 2,
        "num_classes": num_classes,
        "views": views,
        "dtype": moments.dtype.name,
        "moments": "mean, logvar",
        "shards": [{name: report[name] for name in ("name", "num_records")} for report in reports],
        **about,
    }
    for name, content in ((STATS, stats), (METADATA, metadata)):
        with appears_whole(folder / name) as partial:
            partial.write_text(json.dumps(content, indent=1))
    return stats


def open_shards(folder: str | Path) -> tuple[dict[str, Any], list[Shard]]:
    """Metadata, with the statistics under "stats", and memory-mapped shards of a folder of moments.

    Raises:
      UserError: the folder is missing, or a shard is not what the metadata says.
    """
    path = Path(folder)
    if not (path / METADATA).is_file():
        raise UserError(
            f"data.source: no latents in '{folder}' ({METADATA} is missing); make them with "
            f"python tools/encode_latents.py --source=tfds:imagenet2012 --vae=DIR --out={folder}"
        )
    try:
        metadata = json.loads((path / METADATA).read_text())
        side, channels = metadata["image_size"], metadata["channels"]
        item_shape = (metadata["views"], side, side, 2 * channels)
        listed = [(shard["name"], shard["num_records"]) for shard in metadata["shards"]]
        dtype, num_classes = np.dtype(metadata["dtype"]), metadata["num_classes"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.source: {path / METADATA} is damaged: {error!r}") from error
    metadata["stats"] = json.loads((path / STATS).read_text()) if (path / STATS).is_file() else {}
    shards = []
    for name, num_records in listed:
        moments, labels = (_load(path / f"{name}.{part}.npy") for part in ("moments", "labels"))
        expected = (num_records, *item_shape)
        if moments.shape != expected or moments.dtype != dtype or labels.shape != (num_records,):
            raise UserError(
                f"data.source: {path / name}.moments.npy is {moments.dtype.name} {list(moments.shape)} with "
                f"{list(labels.shape)} labels, expected {dtype.name} {list(expected)}"
            )
        labels = np.asarray(labels)
        if labels.size and not (labels.min() >= -1 and labels.max() < max(num_classes, 1)):
            raise UserError(
                f"data.source: {path / name}.labels.npy has labels {labels.min()} … {labels.max()}, outside "
                f"the {num_classes} classes of {METADATA}"
            )
        shards.append(Shard(np.asarray(moments), labels))
    return metadata, shards


def _load(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        size = file.stat().st_size if file.is_file() else 0
        raise UserError(f"data.source: {file} is missing, cut short or damaged: {size} bytes") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _statistics(moments: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Sums over the unscaled latents that the moments of view 0 describe, for each channel; float64."""
    mean, logvar = np.split(moments[:, 0].astype(np.float64), 2, axis=-1)
    second = mean**2 + np.exp(np.clip(logvar, *LOGVAR_RANGE))
    classes, counts = np.unique(labels, return_counts=True)
    return {
        "values": int(mean[..., 0].size),
        "sum": mean.sum((0, 1, 2)).tolist(),
        "sum_of_squares": second.sum((0, 1, 2)).tolist(),
        "count_per_class": dict(zip(map(str, classes.tolist()), counts.tolist(), strict=True)),
    }
