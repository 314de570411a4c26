"""What the caches of latents that others publish have in common, LMDB or webdataset tars: numbered items.

Both kinds hold items 0 … n-1, each the moments [8, H, W] float32 of one encoded image, channels 0-3
mean and 4-7 log-variance, unscaled, and its class; the second half of the items are, as published, the
encodings of the mirrored images of the first half, in the same order.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from maskdit_jax.errors import UserError

CHANNELS = 8  # four means, four log-variances
MAX_ITEM_BYTES = 2**26  # [8, 1448, 1448]; what a file claims beyond is damage, and not allocated


class Items(NamedTuple):
    """labels [n] int64; read(numbers): moments [8, H, H] float32 of each of these items, one after the
    other; where(number): file and item, for errors."""

    labels: np.ndarray
    read: Callable[[np.ndarray], Iterator[np.ndarray]]
    where: Callable[[int], str]


def number(text: bytes, where: str) -> int:
    """A number of at most twelve digits, written as text; a UserError begins with `where`."""
    if not re.fullmatch(rb"\s*\d{1,12}\s*", text):
        raise UserError(f"{where} is {text[:40]!r}, expected a number")
    return int(text)


def side_of(size: int) -> int:
    """H such that [8, H, H] float32 takes `size` bytes; 0 when there is none."""
    side = math.isqrt(size // (4 * CHANNELS))
    return side if size == 4 * CHANNELS * side**2 else 0
