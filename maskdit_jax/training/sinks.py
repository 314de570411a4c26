"""Where numbers and pictures of a run go: metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import json
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maskdit_jax.config import ConfigDict, leaves
from maskdit_jax.errors import UserError, first_line
from maskdit_jax.files import appears_whole, check_folder
from maskdit_jax.log import log
from maskdit_jax.training.tensorboard import TensorBoard

METRICS, TENSORBOARD, WANDB = "metrics.jsonl", "tensorboard", "wandb"


class Sink(Protocol):
    """What takes numbers, pictures [H, W, 1 or 3] uint8 and texts in Markdown, by name and step."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def write_image(self, step: int, name: str, image: np.ndarray) -> None: ...
    def write_text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


class Sinks:
    """Several sinks as one. What one cannot write, to a full disk perhaps, is given up; the run goes on."""

    def __init__(self, sinks: Sequence[Sink] = ()):
        self._sinks = sinks

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers, each a point of the curve of its name."""
        for sink in self._sinks:
            with survive(type(sink).__name__):
                sink.write_scalars(step, scalars)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture [H, W, 1 or 3] uint8."""
        for sink in self._sinks:
            with survive(type(sink).__name__):
                sink.write_image(step, name, image)

    def text(self, step: int, name: str, text: str) -> None:
        """A text in Markdown."""
        for sink in self._sinks:
            with survive(type(sink).__name__):
                sink.write_text(step, name, text)

    def close(self) -> None:
        """Write out what is buffered."""
        for sink in self._sinks:
            with survive(type(sink).__name__):
                sink.close()


@contextlib.contextmanager
def survive(what: str | Path) -> Iterator[None]:
    """Report that something could not be written, and go on."""
    try:
        yield
    except Exception as error:  # libraries raise what their threads met, of any kind
        log.warning(f"warning: {what} could not be written: {first_line(error)}")


class MetricsFile:
    """JSON lines, one for each report or measurement: `step` and numbers by name.

    Lines of steps after `first_step` are of a command before, which made these steps too but did not save
    them, and are removed: each step is there once.
    """

    def __init__(self, file: Path, first_step: int):
        if file.exists():
            lines = [
                line for line in file.read_text("utf-8", "replace").splitlines() if _step(line) <= first_step
            ]
            with appears_whole(file) as partial:
                partial.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        self._file = file.open("a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line; what is not finite is left out, as JSON has no word for it."""
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step} | finite) + "\n")
        self._file.flush()

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Pictures are files of their own."""

    def write_text(self, step: int, name: str, text: str) -> None:
        """The configuration is a file of its own."""

    def close(self) -> None:
        self._file.close()


def _step(line: str) -> float:
    """Of a line; infinite of one that a killed process wrote in part."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


class WeightsAndBiases:
    """A run of the project, the same one at every start; its environment counts, such as WANDB_MODE=offline.

    Raises:
      UserError: wandb is not installed, or does not start.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"report.wandb={project} needs wandb: pip install '.[wandb]' in the repository, or leave it "
                "empty"
            ) from error
        self._wandb, folder = wandb, workdir / WANDB
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "run_id"
        if not note.exists():
            note.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                dir=workdir,
                id=note.read_text().strip(),
                name=workdir.resolve().name,
                resume="allow",
                config=dict(config),
                settings=wandb.Settings(silent=True),
            )
        except Exception as error:  # of its own, of its service, of the network
            raise UserError(
                f"report.wandb={project}: {first_line(error)}; WANDB_MODE=offline needs neither network nor "
                "account"
            ) from error
        # Its own count of steps takes no point before the last one, as a resumed run makes them.
        self._run.define_metric("*", step_metric="step")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step} | dict(scalars))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        picture = image[..., 0] if image.shape[-1] == 1 else image
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def write_text(self, step: int, name: str, text: str) -> None:
        """The configuration it has as such."""

    def close(self) -> None:
        self._run.finish()


def open_boards(workdir: Path, config: ConfigDict) -> list[Sink]:
    """Weights & Biases and TensorBoard, where the configuration asks for them.

    Raises:
      UserError: what one needs is not installed, or its folder is none.
    """
    boards: list[Sink] = []
    if "wandb" in config.report and config.report.wandb:  # saved configurations may be older
        boards.append(WeightsAndBiases(config.report.wandb, workdir, leaves(config)))
    if config.report.tensorboard:
        boards.append(TensorBoard(workdir / TENSORBOARD))
    return boards
