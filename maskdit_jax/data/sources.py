"""Random-access sources by name: a source reads a batch of its items at a time."""

import functools
import re
import threading
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from maskdit_jax.data.image_sets import ImageSet, open_image_set
from maskdit_jax.data.images import ImageError, centre_square, random_square, to_float
from maskdit_jax.data.shards import open_shards
from maskdit_jax.errors import UserError
from maskdit_jax.log import counted, log
from maskdit_jax.methods.method import Shape

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_HELD_OUT_DIGITS = 360

Batch = dict[str, np.ndarray]


class Source(Protocol):
    """A data set with random access; rms is that of its latents before they are scaled, if it knows.

    class_names: of the labels 0, 1, …; empty where classes have none, or there are no classes.
    """

    shape: Shape
    rms: float | None
    class_names: Sequence[str]

    def __len__(self) -> int: ...

    def read(self, items: np.ndarray, draws: np.ndarray) -> Batch:
        """`labels` [B] int32, and `clean` [B, H, W, C] or `moments` [B, H, W, 2C], of items [B].

        draws [B]: how many items of the run came before each; augmentation is a function of it.
        """


class Digits:
    """scikit-learn's 1,797 handwritten digits: 8×8 pixels, one channel, scaled to [-1, 1].

    One fixed random split holds 360 of them out. classes: those that are taken, by default all; count:
    the first so many of them, 0: all. `images` [n, 8, 8, 1] and `labels` [n] are what it holds.
    """

    shape = Shape(image_size=8, channels=1, num_classes=10)
    rms: float | None = None
    class_names: Sequence[str] = ()

    def __init__(self, split: str = "train", classes: Collection[int] = range(10), count: int = 0):
        images, labels = _load_digits()
        order = np.random.default_rng(0).permutation(len(images))
        held_out, train = np.split(order, [NUM_HELD_OUT_DIGITS])
        chosen = {"train": train, "held_out": held_out}[split]
        chosen = chosen[np.isin(labels[chosen], list(classes))][: count or None]
        self.images, self.labels = images[chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, items: np.ndarray, draws: np.ndarray) -> Batch:
        return {"clean": self.images[items], "labels": self.labels[items]}


def parse_digits(name: str) -> tuple[range, int]:
    """Classes and number of images of a source such as `digits`, `digits:0-7` or `digits:8-9:60`.

    Raises:
      UserError: it is none.
    """
    match = re.fullmatch(r"digits(?::([0-9])-([0-9])(?::([1-9][0-9]{0,3}))?)?", name, re.ASCII)
    first, last, count = match.groups() if match else (None, None, None)
    if not match or (first and last and first > last):
        raise UserError(
            f"data.source={name!r}: expected digits, digits:FIRST-LAST or digits:FIRST-LAST:COUNT, such as "
            "digits:8-9:60, with classes 0 … 9"
        )
    return range(int(first or 0), int(last or 9) + 1), int(count or 0)


class LatentShards:
    """A folder of cached moments; with two views item i is image i // 2, mirrored when i is odd."""

    def __init__(self, folder: str):
        metadata, shards = open_shards(folder)
        self.shape = Shape(*(metadata[name] for name in Shape._fields))
        self.rms = metadata["stats"].get("raw_latents_rms")
        self.class_names = metadata["class_names"]
        self._moments = [shard.moments for shard in shards]
        self._labels = np.concatenate([shard.labels for shard in shards])
        self._starts = np.cumsum([0] + [len(shard.labels) for shard in shards])
        self._views = metadata["views"]

    def __len__(self) -> int:
        return self._views * len(self._labels)

    def read(self, items: np.ndarray, draws: np.ndarray) -> Batch:
        images, views = np.divmod(items, self._views)
        shards = np.searchsorted(self._starts, images, side="right") - 1
        rows = images - self._starts[shards]
        first = self._moments[0]
        moments = np.empty((len(items), *first.shape[2:]), first.dtype)
        # One copy for each item, straight from the page cache: a batch touches nearly as many shards
        # as it has items.
        for place, (shard, row, view) in enumerate(zip(shards.tolist(), rows.tolist(), views.tolist())):
            moments[place] = self._moments[shard][row, view]
        return {"moments": moments, "labels": self._labels[images]}


class Pixels:
    """Images of an `ImageSet` as the model sees them: square, in [-1, 1], at random flipped and zoomed.

    max_unreadable: images of which each that cannot be decoded is named, and the next one of the set stands
    in its place. Which one is a function of the data alone, so it is the same in every process, every epoch
    and after every restart. What cannot be read at all, of a disk that fails perhaps, ends the run instead.
    """

    rms: float | None = None

    def __init__(
        self,
        images: ImageSet,
        *,
        image_size: int,
        seed: int,
        flip: bool,
        max_zoom: float,
        max_unreadable: int = 0,
    ):
        self._images, self._size, self._seed = images, image_size, seed
        self._flip, self._max_zoom = flip, max_zoom
        self._max_unreadable = max_unreadable
        self._unreadable: set[int] = set()
        self._lock = threading.Lock()  # several threads read
        self.shape = Shape(image_size, 3, len(images.classes))
        self.class_names: Sequence[str] = images.classes

    def __len__(self) -> int:
        return len(self._images)

    def read(self, items: np.ndarray, draws: np.ndarray) -> Batch:
        pixels, labels = zip(*map(self._read_one, items.tolist(), draws.tolist()))
        return {"clean": to_float(np.stack(pixels)), "labels": np.array(labels, np.int32)}

    def _read_one(self, item: int, draw: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng([self._seed, draw])
        image, label = self._load(item)
        if self._max_zoom > 1:
            square = random_square(image, self._size, rng, self._max_zoom)
        else:
            square = centre_square(image, self._size)
        return (square[:, ::-1] if self._flip and rng.random() < 0.5 else square), label

    def _load(self, item: int) -> "tuple[Image, int]":
        """An image and its class, or the next ones that can be decoded."""
        for _ in range(len(self._images)):
            if item not in self._unreadable:
                try:
                    return self._images.load(item)
                except ImageError as error:
                    if not self._max_unreadable:
                        raise
                    self._skip(item, error)
            item = (item + 1) % len(self._images)
        raise UserError(f"none of the {counted(len(self._images), 'image')} can be decoded")

    def _skip(self, item: int, error: ImageError) -> None:
        with self._lock:
            if item in self._unreadable:
                return
            self._unreadable.add(item)
            count = len(self._unreadable)
        limit = f"data.max_unreadable={self._max_unreadable}"
        if count > self._max_unreadable:
            raise UserError(
                f"{error}; {counted(count, 'image')} cannot be decoded, more than {limit}: mend or remove "
                "what is named, or give a larger limit"
            )
        log.warning(f"warning: skipped {error}; the next image stands in its place ({count} so far, {limit})")


@functools.cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # scikit-learn is slow to import

    digits = load_digits()
    images = (digits.images / 8 - 1).astype(np.float32)[..., None]
    return images, digits.target.astype(np.int32)


class Augmentation(NamedTuple):
    """What `folder:` and `tfds:` do to an image, at random, and where it cannot be decoded: see `Pixels`."""

    seed: int
    flip: bool
    max_zoom: float
    max_unreadable: int = 0


def _digits(name: str, wanted: Shape, augmentation: Augmentation) -> Source:
    return Digits("train", *parse_digits(name))


def _latents(name: str, wanted: Shape, augmentation: Augmentation) -> Source:
    return LatentShards(name.partition(":")[2])


def _images(name: str, wanted: Shape, augmentation: Augmentation) -> Source:
    return Pixels(open_image_set(name), image_size=wanted.image_size, **augmentation._asdict())


class Kind(NamedTuple):
    """A kind of source: how its names look, what it gives, and open(name, wanted shape, augmentation)."""

    looks: str
    gives: str
    open: Callable[[str, Shape, Augmentation], Source]


SOURCES = {
    "digits": Kind("digits[:FIRST-LAST[:COUNT]]", "pixels", _digits),
    "latents": Kind("latents:FOLDER", "latents", _latents),
    "folder": Kind("folder:PATH", "pixels", _images),
    "tfds": Kind("tfds:NAME", "pixels", _images),
}


def open_source(
    name: str,
    wanted: Shape,
    *,
    space: str,
    seed: int = 0,
    flip: bool = False,
    max_zoom: float = 1.0,
    max_unreadable: int = 0,
) -> Source:
    """Training split of the source of that name; its shape must be the one that is wanted.

    `digits`, or some of them (`parse_digits`), `folder:PATH` and `tfds:NAME` give pixels, the last two
    flipped and zoomed at random if asked to, with so many unreadable ones skipped; `latents:FOLDER` gives
    cached moments. Wanted with num_classes 0, it may have any.

    Raises:
      UserError: unknown name, missing or damaged data, or another shape than what is wanted.
    """
    kind = SOURCES.get(name.partition(":")[0])
    if kind is None:
        looks = ", ".join(kind.looks for kind in SOURCES.values())
        raise UserError(f"data.source={name!r} is unknown; known: {looks}")
    source = kind.open(name, wanted, Augmentation(seed, flip, max_zoom, max_unreadable))
    if kind.gives != space:
        latents = kind.gives == "latents"
        how = "set data.space=latents" if latents else "encode them first: tools/encode_latents.py"
        raise UserError(f"data.source={name!r} gives {kind.gives}, but data.space={space!r}; {how}")
    wanted = wanted._replace(num_classes=wanted.num_classes or source.shape.num_classes)
    if source.shape != wanted:
        differences = [
            f"data.{field}={asked} but the data has {found}"
            for field, asked, found in zip(Shape._fields, wanted, source.shape, strict=True)
            if asked != found
        ]
        raise UserError(f"data.source={name!r} does not fit the model: {'; '.join(differences)}")
    return source
