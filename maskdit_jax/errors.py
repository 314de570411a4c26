"""Errors that a user can cause and mend: commands print them as one line, without a traceback."""

import argparse
import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what, why and what to do.

    Whatever foreign names stand in it, the message is one line that any console can show.
    """

    def __init__(self, message: object):
        super().__init__(printable(message))


def known(name: str, names: Iterable[str], how_many: int = 5) -> str:
    """The known names, the ones most like `name` first, for the end of an error message."""
    ranked = sorted(names, key=lambda n: -difflib.SequenceMatcher(None, name, n).ratio())
    more = ", …" if len(ranked) > how_many else ""
    return ", ".join(ranked[:how_many]) + more


def printable(text: object) -> str:
    """A text as one line that any console can show.

    Names of files and other foreign words may hold line breaks, control characters and bytes that are
    no UTF-8 (surrogates in Python): these are escaped.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def first_line(error: BaseException, length: int = 300) -> str:
    """What an error says in its first line, at most `length` characters; its type where it says nothing.

    Of a long line the beginning and the end are kept: the cause, "No space left on device", comes last.
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = printable(line) or type(error).__name__
    return line if len(line) <= length else f"{line[: length // 3]} … {line[length // 3 + 3 - length :]}"


def shown(value: object, length: int = 80) -> str:
    """A foreign value for a message, cut to `length` characters."""
    # A long number cannot be printed at all.
    huge = isinstance(value, int) and value.bit_length() > 1000
    text = "a huge number" if huge else printable(value if isinstance(value, str) else repr(value))
    return text if len(text) <= length else f"{text[: length - 1]}…"


class _Help(argparse.HelpFormatter):
    """The default of a flag behind its help, where it has one and its help does not speak of it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        words = action.help or ""
        nothing = (
            action.default is None or action.default is False or action.default in ("", argparse.SUPPRESS)
        )
        return words if nothing or "default" in words else f"{words} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Flags of a command, refused in one line; --help shows their defaults."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.formatter_class = _Help

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the flags\n")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a UserError, or what the system says of files, into one line and exit code 2, Ctrl-C into 130."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command continues a run from its newest checkpoint", file=sys.stderr)
        sys.exit(130)
