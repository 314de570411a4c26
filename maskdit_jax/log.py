"""How the package speaks: one logger, plain lines on standard output, and how durations and names are put."""

import contextlib
import io
import logging
import sys
from pathlib import Path
from typing import TextIO

log = logging.getLogger("maskdit_jax")


def log_to_stdout() -> None:
    """Print the package's messages, and nothing else, as plain lines on standard output."""
    # What Orbax and its threads print of an error that we catch and report.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _ignore_closed_loop
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A console that cannot show a character gets its escape, not a traceback of the logger.
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


class LogFile(logging.Handler):
    """The package's messages with their times; held, until a file is opened to append them to."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._held: list[str] = []
        self._file: TextIO | None = None

    def open(self, path: Path) -> None:
        """Append to `path` what was held and what comes."""
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        self._file.writelines(self._held)
        self._file.flush()

    def write(self, message: str) -> None:
        """A line that is no message of the package, with its time."""
        self.emit(logging.makeLogRecord({"msg": message}))

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self.format(record)}\n"
        if self._file is None:
            self._held.append(line)
            return
        with contextlib.suppress(OSError):  # a full disk: the console has it
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()
        super().close()


def _ignore_closed_loop(ignored: "sys.UnraisableHookArgs") -> None:
    """TensorStore's threads answer to an event loop that Orbax closed when another of them failed."""
    if str(ignored.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(ignored)


def duration(seconds: float) -> str:
    """Such as 3m07s or 2h05m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Such as "1 block" or "1,281 blocks"; `plural` for a word that takes more than an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
