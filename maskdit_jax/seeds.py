"""Seeds and labels of samples: as texts, and by rules."""

import re
from collections.abc import Sequence

import numpy as np

from maskdit_jax.errors import UserError, known, shown
from maskdit_jax.sampling import MAX_SEED, Model

LABEL_RULES = ("balanced", "random")
MAX_NUMBERS = 10_000_000  # of one text: 80 MB of them


def choose_labels(
    model: Model, seeds: np.ndarray, labels: str | int | Sequence[int] | Sequence[str] | np.ndarray | None
) -> tuple[str, np.ndarray]:
    """Name of the rule, and a label [n] int32 for each seed [n]; see `write_samples`."""
    num_classes = model.shape.num_classes
    by_rule = labels is None or (isinstance(labels, str) and labels in LABEL_RULES)
    if by_rule and labels == "random" and num_classes:
        drawn = [np.random.default_rng([int(seed)]).integers(num_classes) for seed in seeds]
        return "random", model.check_labels(seeds, drawn)
    if by_rule:
        return ("balanced" if num_classes else "none"), model.check_labels(seeds, None)
    if isinstance(labels, str) and labels not in model.class_names:
        rules = f"expected {', '.join(LABEL_RULES)}, a class by number or name, or one for each seed"
        names = f"; the model knows {known(labels, model.class_names)}" if model.class_names else ""
        raise UserError(f"labels={shown(labels)}: {rules}{names}")
    numbers = model.label_numbers(labels).reshape(-1)
    if len(numbers) == 1:
        return f"class {numbers[0]}", model.check_labels(seeds, numbers[0])
    return "given", model.check_labels(seeds, numbers)


def parse_labels(text: str, class_names: Sequence[str]) -> str | np.ndarray | list[str]:
    """What `choose_labels` takes, of a text: a rule, numbers such as "3,5,7-9", or names of classes.

    A number is one, also where a class has it for a name.

    Raises:
      UserError: numbers that are none.
    """
    if text in LABEL_RULES:
        return text
    if re.fullmatch(r"[-0-9, ]*", text, re.ASCII):
        return parse_integers("--labels", text)
    return text if text in class_names or "," not in text else text.split(",")


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
