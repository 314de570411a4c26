"""Random-access sources by name. An item is a dict of arrays: `label`, and `latents` or `moments`."""

import functools
from typing import NamedTuple, Protocol

import numpy as np

from maskdit_jax.data.latents import open_shards
from maskdit_jax.errors import UserError

NUM_HELD_OUT_DIGITS = 360


class Shape(NamedTuple):
    """What a source says of its items, to be compared with the configuration."""

    image_size: int
    channels: int
    num_classes: int


class Source(Protocol):
    """A data set with random access."""

    shape: Shape

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class Digits:
    """scikit-learn's 1,797 handwritten digits: 8×8 pixels, one channel, scaled to [-1, 1].

    One fixed random split holds 360 of them out. `latents` [8, 8, 1]: what the model learns, here pixels.
    """

    shape = Shape(image_size=8, channels=1, num_classes=10)

    def __init__(self, split: str = "train"):
        images, labels = _load_digits()
        order = np.random.default_rng(0).permutation(len(images))
        held_out, train = np.split(order, [NUM_HELD_OUT_DIGITS])
        chosen = {"train": train, "held_out": held_out}[split]
        self.latents, self.labels = images[chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"latents": self.latents[index], "label": self.labels[index]}


class LatentShards:
    """A folder of cached moments; item i is image i // 2, mirrored when i is odd."""

    def __init__(self, folder: str):
        metadata, self._shards = open_shards(folder)
        self.shape = Shape(*(metadata[name] for name in Shape._fields))
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return 2 * int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image, mirrored = divmod(index, 2)
        shard = int(np.searchsorted(self._ends, image, side="right"))
        record = self._shards[shard][image - self._ends[shard]]
        return {"moments": record["moments"][mirrored], "label": record["label"]}


@functools.cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # scikit-learn is slow to import

    digits = load_digits()
    images = (digits.images / 8 - 1).astype(np.float32)[..., None]
    return images, digits.target.astype(np.int32)


def open_source(name: str, *, image_size: int, channels: int, num_classes: int) -> Source:
    """Training split of the source called `digits` or `latents:FOLDER`; its shape must be the model's.

    A model with num_classes 0 takes any source and ignores its labels.

    Raises:
      UserError: unknown name, missing or damaged folder, or another shape than the model's.
    """
    kind, _, path = name.partition(":")
    if kind == "digits":
        source = Digits()
    elif kind == "latents":
        source = LatentShards(path)
    else:
        raise UserError(f"data.source={name!r} is unknown; known: digits, latents:FOLDER")
    wanted = Shape(image_size, channels, num_classes or source.shape.num_classes)
    if source.shape != wanted:
        differences = [
            f"model.{field}={asked} but the data has {found}"
            for field, asked, found in zip(Shape._fields, wanted, source.shape, strict=True)
            if asked != found
        ]
        raise UserError(f"data.source={name!r} does not fit the model: {'; '.join(differences)}")
    return source
