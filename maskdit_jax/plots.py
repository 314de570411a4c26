"""Pictures of numbers (extra `plots`): the curves of a run, and quality over network calls."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskdit_jax.errors import UserError, first_line
from maskdit_jax.files import appears_whole, check_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TENSORBOARD = "tensorboard"
# What a table of `tools/compare_solvers.py` may hold of each row, and how a plot names it.
QUALITY = {
    "distance": "distance to the 200-step Heun solution (rms)",
    "frechet_distance": "Fréchet distance",
}


def read_scalars(workdir: str | Path) -> dict[str, np.ndarray]:
    """Every scalar of a run's TensorBoard files: name → rows [n, 2] of step and value, by step.

    Of a step that was made again after a crash the last value counts.

    Raises:
      UserError: the folder has none, or they cannot be read.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of TensorFlow, which TensorBoard imports
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    folder = Path(workdir) / TENSORBOARD
    check_folder(folder)
    found: dict[str, dict[int, float]] = {}
    try:
        # One accumulator for each file, in order of time: it would drop what was before a restart.
        for file in sorted(folder.glob("events.out.tfevents.*")):
            events = EventAccumulator(str(file), size_guidance={"tensors": 0, "images": 1})
            events.Reload()
            for name in events.Tags()["tensors"]:
                for event in events.Tensors(name):
                    value = make_ndarray(event.tensor_proto)
                    if value.dtype.kind == "f" and value.ndim == 0:
                        found.setdefault(name, {})[event.step] = float(value)
    except Exception as error:  # a damaged file raises anything
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from error
    if not found:
        raise UserError(f"{folder} holds no scalars: was the run made with report.tensorboard=true?")
    return {name: np.array(sorted(values.items())) for name, values in found.items()}


def plot_run(workdir: str | Path, file: str | Path) -> list[str]:
    """Draw each scalar of a run over its steps into a picture file; the names of the scalars.

    Raises:
      UserError: as `read_scalars`, or matplotlib is not installed.
    """
    scalars = read_scalars(workdir)
    columns = min(len(scalars), 3)
    rows = -(-len(scalars) // columns)
    figure = _figure(4.2 * columns, 2.6 * rows)
    for place, (name, values) in enumerate(sorted(scalars.items())):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.plot(*values.T, linewidth=1)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    _save(figure, file)
    return sorted(scalars)


def plot_quality(rows: Iterable[dict[str, Any]], file: str | Path) -> None:
    """Draw quality over network calls, a line for each solver, into a picture file.

    rows: `solver`, `nfe` and any of `distance`, `frechet_distance`, as `tools/compare_solvers.py` writes.

    Raises:
      UserError: a row lacks something, or matplotlib is not installed.
    """
    rows = list(rows)
    kinds = [kind for kind in QUALITY if any(kind in row for row in rows)]
    if not kinds:
        raise UserError(f"no row holds {' or '.join(QUALITY)}: nothing to draw")
    figure = _figure(5.2 * len(kinds), 3.8)
    from matplotlib.ticker import LogLocator, NullLocator

    for place, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), place + 1)
        try:
            points = [(row["solver"], row["nfe"], row[kind]) for row in rows if kind in row]
            for solver in dict.fromkeys(solver for solver, _, _ in points):
                line = sorted((nfe, value) for name, nfe, value in points if name == solver)
                axes.plot(*zip(*line), marker="o", markersize=3, label=solver)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"rows need a solver, nfe and {kind}: {first_line(error, 80)}") from error
        axes.set(xlabel="network calls per image", ylabel=QUALITY[kind], xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, file)


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError("plots need matplotlib: pip install '.[plots]' in the repository") from error
    # Without pyplot no window system is asked for, and nothing stays in memory.
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", file: str | Path) -> None:
    file = Path(file)
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{file}: expected a name that ends with .png, .svg or .pdf")
    with appears_whole(file) as partial:
        figure.savefig(partial, format=file.suffix[1:], dpi=120)
