"""Seeds and labels of samples: as texts, and by rules."""

from collections.abc import Sequence

import numpy as np

from maskdit_jax.errors import UserError, shown
from maskdit_jax.sampling import MAX_SEED, Model

LABEL_RULES = ("balanced", "random")
MAX_NUMBERS = 10_000_000  # of one text: 80 MB of them


def choose_labels(
    model: Model, seeds: np.ndarray, labels: str | int | Sequence[int] | np.ndarray | None
) -> tuple[str, np.ndarray]:
    """Name of the rule, and a label [n] int32 for each seed [n]; see `write_samples`."""
    num_classes = model.shape.num_classes
    if isinstance(labels, str) and labels not in LABEL_RULES:
        raise UserError(f"labels={shown(labels)}: expected {', '.join(LABEL_RULES)}, a class or one for each")
    if labels is None or isinstance(labels, str):
        if labels == "random" and num_classes:
            drawn = [np.random.default_rng([int(seed)]).integers(num_classes) for seed in seeds]
            return "random", model.check_labels(seeds, drawn)
        return ("balanced" if num_classes else "none"), model.check_labels(seeds, None)
    array = np.asarray(labels, np.int64).reshape(-1)
    if len(array) == 1:
        return f"class {array[0]}", model.check_labels(seeds, np.repeat(array, len(seeds)))
    return "given", model.check_labels(seeds, array)


def as_ranges(seeds: np.ndarray) -> str:
    """Such as "0-49999" or "3,5,7-9" of integers [n], sorted."""
    ordered = np.sort(seeds)
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 2) != 1)
    ends = np.append(starts[1:], len(ordered)) - 1
    return ",".join(
        f"{low}" if low == high else f"{low}-{high}" for low, high in zip(ordered[starts], ordered[ends])
    )


def parse_integers(name: str, text: str) -> np.ndarray:
    """Integers [n] of a text such as "3,5,7-9", which stands under a name; -1 is allowed.

    Raises:
      UserError: the text is something else.
    """
    ranges = []
    try:
        for part in text.split(","):
            first, separator, last = part.strip().rpartition("-")
            start, end = (int(first), int(last)) if separator and first else (int(part), int(part))
            if end < start or abs(start) > MAX_SEED or end > MAX_SEED:
                raise ValueError
            ranges.append((start, end + 1))
    except ValueError:
        raise UserError(
            f"{name}={shown(text)}: expected integers up to {MAX_SEED}, such as 0-49999 or 3,5,7-9"
        ) from None
    count = sum(end - start for start, end in ranges)
    if count > MAX_NUMBERS:
        raise UserError(f"{name}={shown(text)}: {count:,} numbers; at most {MAX_NUMBERS:,} in one command")
    return np.concatenate([np.arange(start, end, dtype=np.int64) for start, end in ranges])
