"""Images → shards of moments: resumable, shared between processes, indifferent to corrupt images."""

import collections
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from maskdit_jax.data.image_sets import ImageSet
from maskdit_jax.data.images import centre_square, to_float
from maskdit_jax.data.shards import DTYPES, METADATA, finish_shards, read_report, shard_names, write_shard
from maskdit_jax.data.vae import Autoencoder
from maskdit_jax.errors import UserError, printable
from maskdit_jax.files import appears_whole, read_json
from maskdit_jax.log import counted, duration, log

SETTINGS = "encoding.json"
BATCHES_AHEAD = 2
SECONDS_BETWEEN_REPORTS = 10


class Encoding(NamedTuple):
    """How to encode. Every process must be given the same but for its `part`: (index, of how many).

    resolution: pixels per side; batch_size: images, each also mirrored, of one call of the
    autoencoder; max_corrupt: a process stops once it has met more unreadable images than these.
    """

    resolution: int
    shard_size: int = 4096
    batch_size: int = 64
    dtype: str = "float16"
    num_threads: int = 8
    max_corrupt: int = 100
    part: tuple[int, int] = (0, 1)


def encode_images(
    images: ImageSet, autoencoder: Autoencoder, out: Path, how: Encoding, *, source: str
) -> None:
    """Moments of every image and of its mirror image as a folder of shards.

    Shard i is images i·shard_size … of the set, so any number of processes can each take every n-th
    shard. What a killed process left unfinished the next one makes again; the last to finish writes
    the metadata that makes the folder a data set. The bytes of a shard depend on its images only.

    Raises:
      UserError: `out` holds another encoding, too many corrupt images, or a setting that cannot be.
    """
    _check(autoencoder, how)
    names = shard_names(math.ceil(len(images) / how.shard_size))
    out.mkdir(parents=True, exist_ok=True)
    about = {"source": source, "resolution": how.resolution, "autoencoder": autoencoder.sha256}
    chosen = {name: getattr(how, name) for name in ("shard_size", "batch_size", "dtype")}
    _claim(out, about | chosen | {"num_images": len(images)})
    index, count = how.part
    mine = names[index::count]
    todo = [name for name in mine if read_report(out, name) is None]
    if len(todo) < len(mine):
        log.info(f"{len(mine) - len(todo)} of {len(mine)} shards are complete and sound")
    items_of = {
        name: range(i * how.shard_size, min((i + 1) * how.shard_size, len(images)))
        for i, name in enumerate(names)
    }
    progress, corrupt = _Progress(sum(len(items_of[name]) for name in todo)), 0
    with ThreadPoolExecutor(how.num_threads) as pool:
        for name in todo:
            batches = _decoded(images, items_of[name], how, pool)
            moments, labels, skipped = _encode(images, batches, autoencoder, how, progress)
            write_shard(out, name, moments, labels, skipped=skipped)
            corrupt += len(skipped)
            if corrupt > how.max_corrupt:
                raise UserError(
                    f"{counted(corrupt, 'image')} cannot be read, more than max_corrupt={how.max_corrupt}: "
                    "mend or remove what the warnings name, or give a larger --max_corrupt"
                )
    reports = [report for name in names if (report := read_report(out, name, verify=False))]
    missing = len(names) - len(reports)
    if missing:
        are = "is" if missing == 1 else "are"
        log.info(
            f"part {index}/{count} is complete; {missing} of {counted(len(names), 'shard')} {are} left for "
            "other processes"
        )
        return
    stats = finish_shards(
        out,
        reports,
        num_classes=len(images.classes),
        latent_scale=autoencoder.latent_scale,
        about=about,
        class_names=images.classes,
    )
    log.info(
        f"encoded {counted(stats['num_images'], 'image')}, each with its mirror image, to {printable(out)}: "
        f"{counted(len(names), 'shard')}, {counted(len(stats['skipped']), 'image')} skipped, "
        f"latents rms {stats['latents_rms']:.3f}"
    )


def _check(autoencoder: Autoencoder, how: Encoding) -> None:
    index, count = how.part
    if how.dtype not in DTYPES:
        raise UserError(f"dtype={how.dtype!r} is unknown; known: {', '.join(DTYPES)}")
    if not 0 <= index < count:
        raise UserError(f"part={index}/{count}: expected I/N with 0 <= I < N")
    if how.resolution < 1 or how.resolution % autoencoder.factor:
        raise UserError(f"resolution={how.resolution} must be a multiple of {autoencoder.factor}")
    for name in ("shard_size", "batch_size", "num_threads"):
        if getattr(how, name) < 1:
            raise UserError(f"{name}={getattr(how, name)} must be at least 1")


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Note the settings in a new folder; in one that has them, compare."""
    file = out / SETTINGS
    if not file.exists():
        if (out / METADATA).exists():
            raise UserError(f"{out} already holds a data set of another origin: choose a new folder")
        with appears_whole(file) as partial:
            partial.write_text(json.dumps(settings, indent=1))
    try:
        found = read_json(file)
    except UserError as error:
        raise UserError(
            f"{error}; choose a new folder, or remove that file if {out} is of this encoding"
        ) from error
    differences = [
        f"{name}={value} here, {found.get(name)!s:.80} there"
        for name, value in settings.items()
        if found.get(name) != value
    ]
    if differences:
        raise UserError(f"{out} holds another encoding: {'; '.join(differences)}; choose a new folder")


Decoded = list[tuple[int, np.ndarray | None, int]]


def _encode(
    images: ImageSet,
    batches: Iterator[Decoded],
    autoencoder: Autoencoder,
    how: Encoding,
    progress: "_Progress",
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Moments [n, 2, H, W, 2C] and labels [n] of the images of one shard; names of the unreadable ones."""
    side = how.resolution // autoencoder.factor
    moments = [np.empty((0, 2, side, side, 2 * autoencoder.channels), how.dtype)]
    labels, skipped = [], []
    for batch in batches:
        good = [(square, label) for _, square, label in batch if square is not None]
        skipped += [images.name(item) for item, square, _ in batch if square is None]
        if good:
            both = np.stack([view for square, _ in good for view in (square, square[:, ::-1])])
            # Filled up, so that there is one program, and an image gets the same bits in any batch.
            filled = both[np.arange(2 * how.batch_size) % len(both)]
            encoded = np.asarray(autoencoder.encode(jnp.asarray(to_float(filled))))[: len(both)]
            moments.append(encoded.astype(how.dtype).reshape(len(good), 2, *encoded.shape[1:]))
            labels += [label for _, label in good]
        progress.add(len(batch))
    return np.concatenate(moments), np.array(labels, np.int32), skipped


def _decoded(images: ImageSet, items: range, how: Encoding, pool: ThreadPoolExecutor) -> Iterator[Decoded]:
    """Batches of (item, square uint8 or None if it cannot be read, label), decoded ahead in the pool."""

    def decode(item: int) -> tuple[int, np.ndarray | None, int]:
        try:
            image, label = images.load(item)
            return item, centre_square(image, how.resolution), label
        except UserError as error:
            log.warning(f"warning: skipped {error}")
            return item, None, -1

    waiting: collections.deque[list[Future]] = collections.deque()
    for start in range(0, len(items), how.batch_size):
        waiting.append([pool.submit(decode, item) for item in items[start : start + how.batch_size]])
        if len(waiting) > BATCHES_AHEAD:
            yield [future.result() for future in waiting.popleft()]
    for batch in waiting:
        yield [future.result() for future in batch]


class _Progress:
    """A line every few seconds: images done, their speed, the time left."""

    def __init__(self, num_images: int):
        self._left, self._done = num_images, 0
        self._started = self._reported = time.monotonic()

    def add(self, count: int) -> None:
        self._done, self._left = self._done + count, self._left - count
        now = time.monotonic()
        if now - self._reported >= SECONDS_BETWEEN_REPORTS or not self._left:
            self._reported = now
            speed = self._done / (now - self._started)
            left = duration(self._left / speed)
            log.info(f"{counted(self._done, 'image')} · {speed:,.1f} images/s · {left} left")
