"""What a run's folder says of it to people: its options, how it was started, its messages with times."""

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

import maskdit_jax
from maskdit_jax.config import ConfigDict
from maskdit_jax.errors import UserError
from maskdit_jax.files import appears_whole
from maskdit_jax.log import LogFile, log
from maskdit_jax.training.sinks import survive

CONFIG, STARTS, LOG = "config.json", "starts.jsonl", "log.txt"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class RunFolder:
    """Within the block messages are held, and go to log.txt when the run begins; a refused run leaves none.

    Of several processes only the first writes.
    """

    def __init__(self, workdir: Path):
        self._workdir, self._writes = workdir, jax.process_index() == 0
        self._log_file = LogFile()

    def __enter__(self) -> "RunFolder":
        if self._writes:
            log.addHandler(self._log_file)
        return self

    def begin(self, config: ConfigDict, step: int) -> None:
        """Write the options of the run and how it was started, now at `step`; open log.txt."""
        if not self._writes:
            return
        with survive(self._workdir / CONFIG), appears_whole(self._workdir / CONFIG) as partial:
            partial.write_text(json.dumps(config.to_dict(), indent=1))
        with survive(self._workdir / STARTS), (self._workdir / STARTS).open("a") as file:
            file.write(json.dumps({"step": step} | this_start()) + "\n")
        with survive(self._workdir / LOG):
            self._log_file.open(self._workdir / LOG)

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: TracebackType | None) -> None:
        if isinstance(error, UserError):  # which the command will print
            self._log_file.write(f"error: {error}")
        log.removeHandler(self._log_file)
        self._log_file.close()


def this_start() -> dict[str, Any]:
    """When, by which command, on what and with which software this process was started."""
    found = {name: version(name) for name in _PACKAGES}
    found |= {"maskdit_jax": maskdit_jax.__version__, "python": platform.python_version()}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [sys.executable, *sys.argv],
        "host": platform.node(),
        "processes": jax.process_count(),
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": found,
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of the code, and whether files have changed since; None outside of a git repository."""
    package = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not one that it is only installed in
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
