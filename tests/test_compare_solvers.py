"""The comparison of solvers, on the finished tiny run."""

import json

import pytest
from tiny import call_tool, refusal


@pytest.mark.slow
def test_samples_come_to_the_exact_path_as_calls_grow_and_are_on_it_at_its_own_number(
    run, tmp_path, monkeypatch
):
    file, flags = tmp_path / "rows.json", ["--seeds=3", "--frechet=5", "--batch_size=8", "--solvers=heun"]
    call_tool(
        monkeypatch, "compare_solvers", f"--workdir={run}", *flags, "--calls=4,40,399", f"--json={file}"
    )
    few, more, all_of_them = json.loads(file.read_text())["rows"]
    assert [(row["num_steps"], row["nfe"]) for row in (few, more, all_of_them)] == [
        (2, 3),
        (20, 39),
        (200, 399),
    ]
    assert few["distance"] > 10 * more["distance"] > 0
    assert all_of_them["distance"] == 0
    assert few["frechet_distance"] != more["frechet_distance"] > 0


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--calls=0", "--calls=0: expected numbers from 1 to 10,000"),
        ("--frechet=1", "--frechet=1 has no covariance"),
        ("--seeds=0", "--seeds=0 must be at least 1"),
        ("--solvers=heun,best", "solver='best' is unknown; known: "),
        ("--step=7", "step=7: "),
    ],
)
def test_comparison_that_cannot_be_made_is_refused(flag, named, run, monkeypatch, capsys):
    assert named in refusal(capsys, call_tool, monkeypatch, "compare_solvers", f"--workdir={run}", flag)
