"""Curves of a run and quality over network calls, as pictures."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny import NUM_STEPS, call_tool, refusal

from maskdit_jax import UserError
from maskdit_jax.plots import plot_quality, plot_run, read_scalars

pytest.importorskip("matplotlib")
ROWS = [
    {"solver": solver, "nfe": nfe, "distance": 1 / nfe, "frechet_distance": 2.0}
    for solver in ("heun", "euler")
    for nfe in (9, 5)
]


def test_curves_of_a_run_are_its_numbers(run, tmp_path, monkeypatch, capsys):
    """Every step's loss is there once."""
    scalars = read_scalars(run)
    assert scalars["loss"].shape == (NUM_STEPS, 2)
    np.testing.assert_array_equal(scalars["loss"][:, 0], np.arange(NUM_STEPS) + 1)
    assert np.isfinite(scalars["loss"]).all()
    call_tool(monkeypatch, "plot", f"--workdir={run}", f"--out={tmp_path / 'run.png'}")
    assert "grad_norm" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "run.png").convert("L"))
    assert picture.std() > 5


def test_a_folder_without_numbers_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        read_scalars(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="reported nothing yet"):
        plot_run(tmp_path, tmp_path / "run.png")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "3",
        '{"loss": 1}',
        '{"step": 1}',
        '{"step": 1.5, "a": 1}',
        '{"step": 2, "a": "x"}',
        "\xff",
    ],
)
def test_a_damaged_line_is_refused_with_its_number(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected a step and numbers"):
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
