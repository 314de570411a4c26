"""The processes of a run agree before it begins: same options, code, versions, data and folder.

They would train side by side all the same, each with its own seed or learning rate, and end with
checkpoints whose parts do not fit together.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import orbax.checkpoint

from maskdit_jax.config import ConfigDict, leaves
from maskdit_jax.data.sources import Source
from maskdit_jax.distributed.hosts import Refused, from_all, from_first

_LONGEST_VALUE = 200
# A network file system may show a new file to other hosts a moment later.
_SEEN_WITHIN_S = 3.0


def agree(facts: Mapping[str, Any]) -> None:
    """Compare what every process holds for true with what process 0 does; all call this at the same place.

    Args:
      facts: names and values, which JSON can hold; the first that differs is named.

    Raises:
      Refused: in all processes, when one differs; there the line names what is different in it, in the
        others what is different in the first that differs.
    """
    if jax.process_count() == 1:
        return
    process = jax.process_index()
    lines = from_all(difference(facts, from_first(dict(facts)), process))
    if any(lines):
        raise Refused(lines[process] or next(filter(None, lines)))


def difference(facts: Mapping[str, Any], first: Mapping[str, Any], process: int) -> str:
    """The first difference between the facts of `process` and those of process 0 as a line; "" for none."""
    for name in [*first, *(name for name in facts if name not in first)]:
        here, there = (_shown(known, name) for known in (facts, first))
        if here != there:
            return (
                f"{name} is {_cut(here)} in process {process}, but {_cut(there)} in process 0: start all "
                "processes of a run with the same options, code and data"
            )
    return ""


def _shown(facts: Mapping[str, Any], name: str) -> str:
    return json.dumps(facts[name], ensure_ascii=False) if name in facts else "not known"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def this_process() -> dict[str, Any]:
    """Facts of the software and the devices, for `agree`."""
    return {
        "the code of maskdit_jax (its digest)": _digest_of_code(),
        "the version of jax": jax.__version__,
        "the version of flax": flax.__version__,
        "the version of orbax-checkpoint": orbax.checkpoint.__version__,
        "JAX's backend": jax.default_backend(),
        "the number of its devices": jax.local_device_count(),
    }


def _digest_of_code() -> str:
    """Of all Python files of the package: two checkouts may say the same version and differ."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def run_options(config: ConfigDict, workdir: Path | None) -> dict[str, Any]:
    """Facts of a training run's command, for `agree`: the folder and every option of the configuration."""
    folder = {"--workdir": os.path.realpath(workdir)} if workdir else {}
    return folder | {f"--config.{name}": value for name, value in leaves(config).items()}


def data_identity(config: ConfigDict, source: Source) -> dict[str, Any]:
    """Facts of the data that were opened, for `agree`: one name may stand for other files on each host."""
    name = config.data.source
    return {
        f"the number of items of {name}": len(source),
        f"the shape of {name}": source.shape._asdict(),
        f"the rms of {name}": source.rms,
    }


def check_same_folder(flag: str, folder: Path) -> Path:
    """All processes see a file that process 0 leaves for a moment in `folder`, or the nearest one above it.

    Returns the folder that was tried.

    Raises:
      Refused: in all processes: one does not see it, or process 0 cannot write there.
    """
    there = nearest(folder)
    if jax.process_count() == 1:
        return there
    marker, problem = there / f".same-folder-{secrets.token_hex(8)}", ""
    if jax.process_index() == 0:
        try:
            marker.touch()
        except OSError as error:
            problem = f"cannot write to {folder}: {error.strerror}; choose another folder"
    marker_of_first, problem = from_first([str(marker), problem])
    if problem:
        raise Refused(problem)
    try:
        seen = from_all(_appears(marker_of_first))
    finally:
        if jax.process_index() == 0:
            marker.unlink(missing_ok=True)
    if not all(seen):
        raise Refused(
            f"process {seen.index(False)} does not see the file that process 0 has left in "
            f"{Path(marker_of_first).parent}: give all processes the same absolute {flag}, on a file system "
            "that their hosts share"
        )
    return there


def _appears(file: str) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not os.path.exists(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = Path(os.path.realpath(folder))
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))
