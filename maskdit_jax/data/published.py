"""The published caches of latents, LMDB or webdataset tars, as the shards that we train from."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maskdit_jax.data import lmdb_items, tar_items
from maskdit_jax.data.items import Items
from maskdit_jax.data.shards import (
    METADATA,
    PARTS,
    STATS,
    finish_shards,
    load_array,
    read_report,
    shard_names,
    write_shard,
)
from maskdit_jax.errors import UserError, printable
from maskdit_jax.log import counted, log

READERS = {"lmdb": lmdb_items.lmdb_items, "webdataset": tar_items.tar_items}
INPUTS = {"lmdb": lmdb_items.INPUT, "webdataset": tar_items.INPUT}


def import_latents(
    input: Path,
    out: Path,
    *,
    format: str,
    num_classes: int,
    latent_scale: float,
    flips: bool,
    shard_size: int,
) -> dict[str, Any]:
    """Write the items of `input` as shards [n, views, H, H, 8] float32, bit for bit; the statistics.

    format: "lmdb", `input` is the folder of data.mdb, or "webdataset", the folder of the tars.
    flips: item i + n/2 becomes view 1 of record i. Otherwise each item is a record of one view.
    Shards that an interrupted import of the same items left in `out` are kept.

    Raises:
      UserError: an item is missing, twice or not what it should be, or `out` is in use. `out` is then
        no data set: metadata.json, which makes it one, comes last.
    """
    if format not in READERS:
        raise UserError(f"format={format} is unknown: {', '.join(READERS)}")
    for name, value in (("num_classes", num_classes), ("shard_size", shard_size)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if not 0 < latent_scale < math.inf:
        raise UserError(f"latent_scale={latent_scale} must be a positive number")
    if (out / METADATA).exists():
        raise UserError(f"{out} already is a data set, with a {METADATA}: give another folder, or remove it")
    if not input.is_dir():
        raise UserError(f"{input}: no such folder; for --format={format} it is {INPUTS[format]}")
    with READERS[format](input) as items:
        records = _records(items, input, num_classes=num_classes, flips=flips)
        reports = _write_shards(items, records, out, shard_size)
    views = records.shape[1]
    written = views * sum(report["num_records"] for report in reports)
    if written != len(items.labels):
        raise UserError(f"{out} holds {written:,} items, but {input} holds {len(items.labels):,}")
    about = {"source": str(input), "autoencoder": "unknown"}
    with _written(out):
        stats = finish_shards(out, reports, num_classes=num_classes, latent_scale=latent_scale, about=about)
    log.info(
        f"imported {counted(len(records), 'image')} ({counted(written, 'view')}) from {printable(input)} to "
        f"{printable(out)}: {counted(len(reports), 'shard')}, latents rms {stats['latents_rms']:.2f}"
    )
    return stats


def _records(items: Items, source: Path, *, num_classes: int, flips: bool) -> np.ndarray:
    """Numbers [records, views] of the items that form each record."""
    labels = items.labels
    if not len(labels):
        raise UserError(f"{source} holds no items")
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        more = f"; so are {counted(outside.size - 1, 'other')}" if outside.size > 1 else ""
        raise UserError(
            f"{items.where(outside[0])}: class {labels[outside[0]]} is outside 0 … {num_classes - 1} "
            f"(num_classes={num_classes}){more}"
        )
    numbers = np.arange(len(labels))
    if not flips:
        return numbers[:, None]
    if len(labels) % 2:
        raise UserError(
            f"{source} holds {len(labels):,} items, an odd number, so its second half cannot be the flips "
            "of the first: give --no_flips if it was made without flips"
        )
    records = np.ascontiguousarray(numbers.reshape(2, -1).T)
    unlike = np.flatnonzero(labels[records[:, 0]] != labels[records[:, 1]])
    if unlike.size:
        image, flip = records[unlike[0]]
        raise UserError(
            f"{items.where(flip)}: class {labels[flip]}, but item {image}, whose flip it should be, is of "
            f"class {labels[image]}: give --no_flips if the second half are not flips of the first"
        )
    return records


def _write_shards(items: Items, records: np.ndarray, out: Path, shard_size: int) -> list[dict[str, Any]]:
    """Write what is not in `out` yet; the reports of all shards, read back from there."""
    starts = range(0, len(records), shard_size)
    names = shard_names(len(starts))
    _check_folder(out, names)
    shape = next(items.read(records[:1, 0])).shape
    reports = []
    for name, start in zip(names, starts):
        part = records[start : start + shard_size]
        labels = items.labels[part[:, 0]]
        kept = report = _report(out, name, labels, _moments(items, part[:1], shape))
        if report is None:
            moments = _moments(items, part, shape)
            with _written(out / name):
                write_shard(out, name, moments, labels)
            report = _report(out, name, labels, moments[:1])
            if report is None:
                raise UserError(f"{out / name} was written, but its files read back are not the same")
        reports.append(report)
        log.info(f"{name} {'kept' if kept else 'written'}: {start + len(part):,} of {len(records):,} images")
    return reports


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """Say it in one line when the disk is full or the folder read-only."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} could not be written: {error}") from error


def _check_folder(out: Path, names: list[str]) -> None:
    """Make the folder; refuse one with files that these shards would not replace."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder")
    with _written(out):
        out.mkdir(parents=True, exist_ok=True)
    ours = {f"{name}.{part}" for name in names for part in ("moments.npy", "labels.npy", "json")}
    ours |= {METADATA, STATS}
    for file in sorted(out.iterdir()):
        if file.name.removesuffix(".partial") not in ours:
            raise UserError(
                f"{file} is not of this import: give the --shard_size it was begun with, or another folder"
            )


def _moments(items: Items, records: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Moments [n, views, H, W, 8] float32 of records [n, views]; every item must be of `shape` [8, H, W]."""
    moments = np.empty((*records.shape, *shape[1:], shape[0]), np.float32)
    for (place, number), item in zip(np.ndenumerate(records), items.read(records.ravel()), strict=True):
        if item.shape != shape:
            raise UserError(f"{items.where(number)}: {list(item.shape)}, but item 0 is {list(shape)}")
        if not np.isfinite(item).all():
            log.warning(
                f"{printable(items.where(number))}: not all of its values are finite; imported as it is"
            )
        moments[place] = item.transpose(1, 2, 0)
    return moments


def _report(out: Path, name: str, labels: np.ndarray, first: np.ndarray) -> dict[str, Any] | None:
    """The report of a sound shard, None when there is none.

    labels [n] and the shard's first record [1, views, H, W, 8] tell whether it is one of this import.
    """
    report = read_report(out, name)
    if report is None:
        return None
    found = [load_array(out / f"{name}.{part}.npy") for part in PARTS]
    same = found[0].shape == (len(labels), *first.shape[1:]) and found[0].dtype == first.dtype
    # As bytes: a NaN is itself, too.
    if not (same and np.array_equal(found[1], labels) and found[0][:1].tobytes() == first.tobytes()):
        raise UserError(f"{out / name} is of another import: give another folder, or remove it")
    return report
