"""Features of images, in which sets of images are compared: by name, with the hash of the weights behind them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from maskdit_jax.data.images import to_float


class Extractor(NamedTuple):
    """What makes features of images.

    name, digest: "inception" or "pixels", and the sha256 of its weights, "" where there are none; both stand
    in reference files and cards, so that only like is compared with like.
    extract: images [B, H, W, C], uint8 or float32 in [-1, 1] as a model gives (or latents) → features by
    part, float32: "pool" [B, D] always, and where there are such "spatial" [B, S] and "logits" [B, K].
    """

    name: str
    digest: str
    extract: Callable[[np.ndarray], dict[str, np.ndarray]]


def _pixels(images: np.ndarray) -> dict[str, np.ndarray]:
    x = to_float(images) if images.dtype == np.uint8 else np.clip(images.astype(np.float32), -1, 1)
    return {"pool": x.reshape(len(x), -1)}


# The pixels themselves, clipped to the range that real ones have: for images as small as digits.
PIXELS = Extractor("pixels", "", _pixels)
