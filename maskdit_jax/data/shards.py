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
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskdit_jax.data.codec import LOGVAR_RANGE
from maskdit_jax.errors import UserError, shown
from maskdit_jax.files import appears_whole, read_json

METADATA, STATS = "metadata.json", "stats.json"
DTYPES = ("float16", "float32")
PARTS = ("moments", "labels")


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
    sha256 = {}
    for part, array in zip(PARTS, (moments, labels), strict=True):
        file = folder / f"{name}.{part}.npy"
        with appears_whole(file) as partial, partial.open("wb") as out:
            np.save(out, np.ascontiguousarray(array))
        sha256[part] = _sha256(file)
    report = {
        "name": name,
        "num_records": len(labels),
        "skipped": list(skipped),
        "sha256": sha256,
        "statistics": _statistics(moments, labels),
    }
    with appears_whole(folder / f"{name}.json") as partial:
        partial.write_text(json.dumps(report))


def read_report(folder: Path, name: str, verify: bool = True) -> dict[str, Any] | None:
    """The report of a shard; None when it is missing or damaged, or the files are not those written.

    Without `verify` the files themselves are not read. A shard without a sound report is made again.
    """
    try:
        report = read_json(folder / f"{name}.json")
        files = {part: folder / f"{name}.{part}.npy" for part in PARTS}
        sound = _is_report(report, name) and all(file.is_file() for file in files.values())
        if sound and verify:
            sound = all(_sha256(file) == report["sha256"][part] for part, file in files.items())
    except (OSError, UserError):
        return None
    return report if sound else None


def _is_report(report: dict[str, Any], name: str) -> bool:
    """Whether it has the form that `write_shard` gives it."""
    match report:
        case {
            "name": str(found),
            "num_records": int(count),
            "skipped": [*skipped],
            "sha256": {"moments": str(), "labels": str()},
            "statistics": {
                "values": int(values),
                "sum": [*sums],
                "sum_of_squares": [*squares],
                "count_per_class": dict(classes),
            },
        }:
            return (
                found == name
                and 0 <= count <= values < 2**63  # as many values as images, at least
                and all(isinstance(image, str) for image in skipped)
                and len(sums) == len(squares)
                and all(isinstance(number, float) for number in sums + squares)
                and all(re.fullmatch(r"-?\d{1,9}", label, re.ASCII) for label in classes)
                and all(isinstance(number, int) for number in classes.values())
            )
    return False


def finish_shards(
    folder: Path,
    reports: list[dict[str, Any]],
    *,
    num_classes: int,
    latent_scale: float,
    about: dict[str, Any],
    class_names: Sequence[str] = (),
) -> dict[str, Any]:
    """Write `stats.json` and then `metadata.json`, which makes the folder a data set; the statistics.

    class_names: of the classes 0, 1, …, where they have names. `about` says where the moments are from; it
    stands in both files. Empty shards are left out.
    """
    reports = [report for report in reports if report["num_records"]]
    if not reports:
        raise UserError(f"{folder}: no image could be read, so there is no data set")
    moments = load_array(folder / f"{reports[0]['name']}.moments.npy")
    if moments.ndim != 5:
        raise UserError(f"{folder / reports[0]['name']}.moments.npy is {list(moments.shape)}, not moments")
    _, views, image_size, _, channels2 = moments.shape
    for report in reports:
        if len(report["statistics"]["sum"]) != channels2 // 2:
            raise UserError(
                f"{folder / report['name']}.json is not of {channels2 // 2} channels: remove it; the command "
                "makes its shard again"
            )
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
    with np.errstate(invalid="ignore", over="ignore"):  # values that are not finite have been warned of
        deviation = np.sqrt(second - mean**2)
    stats = {
        "num_images": sum(report["num_records"] for report in reports),
        "count_per_class": dict(sorted(count_per_class.items(), key=lambda item: int(item[0]))),
        "latent_scale": latent_scale,
        "latents_mean": (latent_scale * mean).tolist(),
        "latents_std": (latent_scale * deviation).tolist(),
        "latents_rms": float(latent_scale * np.sqrt(second.mean())),
        "raw_latents_rms": float(np.sqrt(second.mean())),
        "skipped": [name for report in reports for name in report["skipped"]],
        **about,
    }
    metadata = {
        "image_size": image_size,
        "channels": channels2 // 2,
        "num_classes": num_classes,
        "views": views,
        "dtype": moments.dtype.name,
        "moments": "mean, logvar",
        "shards": [{name: report[name] for name in ("name", "num_records")} for report in reports],
        "class_names": list(class_names),
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
    metadata = read_json(path / METADATA)
    listed, item_shape = _check_metadata(path / METADATA, metadata)
    dtype, num_classes = metadata["dtype"], metadata["num_classes"]
    try:
        metadata["class_names"] = checked_class_names(metadata.get("class_names", []), num_classes)
    except UserError as error:
        raise UserError(f"{path / METADATA} is damaged: {error}") from None
    metadata["stats"] = read_json(path / STATS) if (path / STATS).exists() else {}
    rms = metadata["stats"].get("raw_latents_rms")
    if rms is not None and not isinstance(rms, float):
        raise UserError(f"{path / STATS} is damaged: raw_latents_rms={rms!r:.40}, expected a number")
    shards = []
    for name, num_records in listed.items():
        moments, labels = (load_array(path / f"{name}.{part}.npy") for part in PARTS)
        expected = (num_records, *item_shape)
        if moments.shape != expected or moments.dtype != dtype or labels.shape != (num_records,):
            raise UserError(
                f"data.source: {path / name}.moments.npy is {moments.dtype!s:.40} {list(moments.shape)!s:.80}"
                f" with {list(labels.shape)!s:.40} labels, expected {dtype} {list(expected)}"
            )
        if labels.dtype.kind not in "iu":
            raise UserError(
                f"data.source: {path / name}.labels.npy holds {labels.dtype!s:.40}, expected whole numbers"
            )
        if not (labels.min() >= -1 and labels.max() < max(num_classes, 1)):
            raise UserError(
                f"data.source: {path / name}.labels.npy has labels {labels.min()} … {labels.max()}, outside "
                f"the {num_classes} classes of {METADATA}"
            )
        shards.append(Shard(np.asarray(moments), np.asarray(labels, np.int32)))
    return metadata, shards


def _check_metadata(file: Path, metadata: dict[str, Any]) -> tuple[dict[str, int], tuple[int, ...]]:
    """The shards that the metadata lists, {name: number of records}, and the shape of one record."""

    def whole(within: dict[str, Any], name: str, low: int) -> int:
        value = within.get(name)
        if type(value) is not int or not low <= value < 2**31:
            raise UserError(
                f"{file} is damaged: {name}={value!r:.40}, expected a whole number of at least {low}"
            )
        return value

    whole(metadata, "num_classes", 0)
    views, side, channels = (whole(metadata, name, 1) for name in ("views", "image_size", "channels"))
    if metadata.get("dtype") not in DTYPES:
        raise UserError(
            f"{file} is damaged: dtype={metadata.get('dtype')!r:.40}, expected {' or '.join(DTYPES)}"
        )
    shards = metadata.get("shards")
    if not isinstance(shards, list) or not shards:
        raise UserError(f"{file} is damaged: shards={shards!r:.40}, expected a list of at least one shard")
    listed: dict[str, int] = {}
    for shard in shards:
        name = shard.get("name") if isinstance(shard, dict) else None
        # A plain name: the folder of somebody else must not make us read files outside of it.
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,199}", name, re.ASCII):
            raise UserError(
                f"{file} is damaged: {shard!r:.80} in shards has no name of a file in this folder"
            )
        if name in listed:
            raise UserError(f"{file} is damaged: it lists {name} twice")
        listed[name] = whole(shard, "num_records", 1)
    return listed, (views, side, side, 2 * channels)


def checked_class_names(names: Any, num_classes: int) -> tuple[str, ...]:
    """Names of classes as a file has them: none, or one for each.

    Raises:
      UserError: they are something else.
    """
    texts = isinstance(names, list) and all(isinstance(name, str) and len(name) <= 1000 for name in names)
    if not texts or len(names) not in (0, num_classes):
        raise UserError(f"class_names={shown(names)}, expected a name for each of {num_classes} classes")
    return tuple(names)


def load_array(file: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped; nothing in the file is unpickled.

    Raises:
      UserError: there is no such file, or it is not the whole of one array of numbers.
    """
    try:
        if not file.is_file():
            raise FileNotFoundError
        with np.errstate(over="ignore"):  # of a size that is a lie; the file is then found too short
            return np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # numpy reads the header as Python: damage makes it raise nearly anything
        size = file.stat().st_size if file.is_file() else 0
        raise UserError(f"data.source: {file} is missing, cut short or damaged: {size:,} bytes") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _statistics(moments: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Sums over the unscaled latents that the moments of view 0 describe, for each channel; float64."""
    with np.errstate(invalid="ignore", over="ignore"):  # values that are not finite have been warned of
        mean, logvar = np.split(moments[:, 0].astype(np.float64), 2, axis=-1)
        second = mean**2 + np.exp(np.clip(logvar, *LOGVAR_RANGE))
    classes, counts = np.unique(labels, return_counts=True)
    return {
        "values": int(mean[..., 0].size),
        "sum": mean.sum((0, 1, 2)).tolist(),
        "sum_of_squares": second.sum((0, 1, 2)).tolist(),
        "count_per_class": dict(zip(map(str, classes.tolist()), counts.tolist(), strict=True)),
    }
