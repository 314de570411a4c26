"""An option, written once: its default, its range and what it is for, beside the code that reads it.

A record of options is a frozen dataclass whose fields are made by `option`; its field types are bool, int,
float, str, or another record. A configuration is such records by the names of its sections.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar, get_type_hints

from maskdit_jax.errors import UserError, shown

MAX_INTEGER = 2**31 - 1  # the counters of the training state are int32
IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_RANGE = "range"
T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A field of a record: `help` says what it does and its unit, the others what it may be."""
    allowed = {"at_least": at_least, "above": above, "at_most": at_most, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, _RANGE: allowed})


def check_options(record: Any, prefix: str = "") -> None:
    """Check the value of every option of a record, and of the records in it; other fields are passed over.

    Raises:
      UserError: a value is of another type, not known, out of range or not finite; `prefix` goes before
        its name.
    """
    for name, field, kind in each_option(type(record)):
        if _RANGE in field.metadata:
            check_option(prefix + name, functools.reduce(getattr, name.split("."), record), field, kind)


def check_option(name: str, value: Any, field: dataclasses.Field, kind: type) -> None:
    """Check the value of one option, made by a field of that type.

    Raises:
      UserError: as `check_options`.
    """
    if not is_a(value, kind):
        raise UserError(f"{name}={shown(repr(value))}: expected {IN_WORDS[kind]}")
    allowed = field.metadata[_RANGE]
    choices = allowed.get("choices")
    if choices is not None and value not in choices:
        raise UserError(f"{name}={shown(repr(value))} is unknown; known: {', '.join(choices)}")
    if isinstance(value, (str, bool)):
        return
    if not isinstance(value, Integral):
        value = float(value)
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"{name}={value} must be finite")
    at_most = allowed.get("at_most")
    if at_most is None and isinstance(value, Integral):
        at_most = MAX_INTEGER
    at_least, above = allowed.get("at_least"), allowed.get("above")
    both = at_least is not None and at_most is not None and isinstance(value, float)
    if both and not at_least <= value <= at_most:
        raise UserError(f"{name}={shown(value)} must be between {at_least:g} and {at_most:g}")
    if at_most is not None and value > at_most:
        raise UserError(f"{name}={shown(value)} must be at most {at_most:,}")
    if math.isinf(value):
        raise UserError(f"{name}={value} must be finite")
    if above is not None and value <= above:
        raise UserError(f"{name}={value} must be greater than {above:g}")
    if at_least is not None and value < at_least:
        must = "not be negative" if at_least == 0 else f"be at least {at_least:,}"
        raise UserError(f"{name}={value} must {must}")


def is_a(value: Any, kind: type) -> bool:
    """Whether a value, of a file perhaps, is one of an option of type `kind`; no truth value is a number."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    # Of numpy's numbers too.
    kinds: dict[type, type] = {int: Integral, float: Real}
    return isinstance(value, kinds.get(kind, kind))


def as_section(record: Any) -> dict[str, Any]:
    """The options of a record by name, nested records as nested dicts."""
    return dataclasses.asdict(record)


def from_section(record: type[T], section: Any) -> T:
    """The record of a section, a mapping that holds every one of its options."""
    hints = get_type_hints(record)
    values = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        kind, value = hints[field.name], section[field.name]
        values[field.name] = from_section(kind, value) if is_record(kind) else value
    return record(**values)


def describe_options(record: type, prefix: str = "") -> dict[str, str]:
    """Full name of every option of a record type → what it is for, and its range."""
    return {
        name: field.metadata.get("help", "") + _range_in_words(field.metadata)
        for name, field, _ in each_option(record, prefix)
    }


def each_option(record: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, type]]:
    """Full name, field and type of every option of a record type, and of the records in it."""
    hints = get_type_hints(record)
    for field in dataclasses.fields(record):
        kind = hints[field.name]
        if is_record(kind):
            yield from each_option(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, kind


def is_record(kind: Any) -> TypeGuard[type]:
    """Whether an option's type is itself a record of options."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _range_in_words(metadata: Mapping[str, Any]) -> str:
    allowed = metadata.get(_RANGE, {})
    bounds = [
        f"{words} {allowed[name]:,}"
        for name, words in (("above", "greater than"), ("at_least", "at least"), ("at_most", "at most"))
        if allowed.get(name) is not None
    ]
    return f" ({', '.join(bounds)})" if bounds else ""
