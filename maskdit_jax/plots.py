"""Pictures of numbers (extra `plots`): the curves of a run, and quality over network calls."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskdit_jax.errors import UserError, first_line
from maskdit_jax.files import MAX_JSON_BYTES, appears_whole
from maskdit_jax.options import is_a
from maskdit_jax.training.sinks import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a table of `tools/compare_solvers.py` may hold of each row, and how a plot names it.
QUALITY = {
    "distance": "distance to the 200-step Heun solution (rms)",
    "frechet_distance": "Fréchet distance",
}


def read_scalars(workdir: str | Path) -> dict[str, np.ndarray]:
    """Every number of a run's metrics.jsonl: name → rows [n, 2] of step and value, by step.

    Raises:
      UserError: the folder has none, or a line of it is damaged.
    """
    file = Path(workdir) / METRICS
    if not file.is_file():
        raise UserError(f"{file}: no such file; runs write it (of older ones TensorBoard shows the curves)")
    if (size := file.stat().st_size) > MAX_JSON_BYTES:
        raise UserError(f"{file} is {size:,} bytes, more than the {MAX_JSON_BYTES:,} that are read of JSON")
    found: dict[str, dict[int, float]] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            values = json.loads(line)
            step = values.pop("step")
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            values, step = {}, None
        if not is_a(step, int) or not values or not all(is_a(value, float) for value in values.values()):
            raise UserError(f"{file}, line {number}: expected a step and numbers by name, as JSON")
        for name, value in values.items():
            found.setdefault(name, {})[step] = float(value)
    return {name: np.array(sorted(values.items())) for name, values in found.items()}


def plot_run(workdir: str | Path, file: str | Path) -> list[str]:
    """Draw each number of a run over its steps into a picture file; their names.

    Raises:
      UserError: as `read_scalars`, or matplotlib is not installed.
    """
    scalars = read_scalars(workdir)
    if not scalars:
        raise UserError(f"{workdir}: the run has reported nothing yet")
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
