"""Curves of a run and quality over network calls, as pictures."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import NUM_STEPS, call_tool, refusal

from maskdit_jax import UserError
from maskdit_jax.plots import plot_quality, read_scalars

pytest.importorskip("matplotlib")
ROWS = [
    {"solver": solver, "nfe": nfe, "distance": 1 / nfe, "frechet_distance": 2.0}
    for solver in ("heun", "euler")
    for nfe in (9, 5)
]


def test_curves_of_a_run_are_its_scalars(run, tmp_path, monkeypatch, capsys):
    """Every step's loss is there once, of a run in several files too."""
    scalars = read_scalars(run)
    assert scalars["loss"].shape == (NUM_STEPS, 2)
    np.testing.assert_array_equal(scalars["loss"][:, 0], np.arange(NUM_STEPS) + 1)
    assert np.isfinite(scalars["loss"]).all()
    shutil.copytree(run / "tensorboard", tmp_path / "again/tensorboard")
    (file,) = (tmp_path / "again/tensorboard").iterdir()
    shutil.copy(file, file.with_name("events.out.tfevents.9999999999.later"))
    np.testing.assert_array_equal(read_scalars(tmp_path / "again")["loss"], scalars["loss"])
    call_tool(monkeypatch, "plot", f"--workdir={run}", f"--out={tmp_path / 'run.png'}")
    assert "grad_norm" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "run.png").convert("L"))
    assert picture.std() > 5


def test_a_run_without_scalars_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no scalars: was the run made with"):
        read_scalars(tmp_path)


def test_quality_is_drawn_for_each_solver(tmp_path, monkeypatch):
    (tmp_path / "solvers.json").write_text(json.dumps({"rows": ROWS}))
    call_tool(
        monkeypatch, "plot", f"--solvers={tmp_path / 'solvers.json'}", f"--out={tmp_path / 'quality.svg'}"
    )
    drawn = (tmp_path / "quality.svg").read_text()
    assert drawn.count("<!-- euler -->") == drawn.count("<!-- heun -->") > 0


@pytest.mark.parametrize(
    ("rows", "named"),
    [([], "nothing to draw"), ([{"distance": 1}], "'solver'"), ([{"solver": "heun", "nfe": 3}], "nothing")],
)
def test_rows_without_what_is_drawn_are_refused(tmp_path, rows, named):
    with pytest.raises(UserError, match=named):
        plot_quality(rows, tmp_path / "quality.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_needs_a_known_ending(run, tmp_path, monkeypatch, capsys):
    flags = ("plot", f"--workdir={run}", f"--out={tmp_path / 'run.jpeg'}")
    assert "expected a name that ends with .png" in refusal(capsys, call_tool, monkeypatch, *flags)
