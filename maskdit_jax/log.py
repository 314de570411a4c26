"""How the package speaks: one logger, plain lines on standard output, and how durations and names are put."""

import io
import logging
import sys

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
