"""Processes that differ do not start: the comparison itself, and real pairs of commands."""

from pathlib import Path

import pytest
from processes import two_process_flags
from test_failures import needs_mount
from test_hosts import BODY, ROOT, in_two_processes, run_all, run_body

from maskdit_jax.config import resolve
from maskdit_jax.config_file import load
from maskdit_jax.data.sources import Digits
from maskdit_jax.training.agreement import data_identity, difference, nearest, run_options, this_process

DIGITS, IN256 = str(ROOT / "configs/digits.py"), str(ROOT / "configs/in256.py")
WORKDIR = Path("/shared/run")
REMEDY = "start all processes of a run with the same options, code and data"


def options(*overrides: str, file: str = DIGITS, workdir: Path = WORKDIR) -> dict:
    overrides = [f"--config.{override}" for override in ("evaluation.num_samples=0", *overrides)]
    return run_options(resolve(load(file, overrides), device_count=1), workdir)


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (lambda: options("seed=1"), "--config.seed is 1 in process 3, but 0 in process 0"),
        (
            lambda: options("optimizer.learning_rate=0.01"),
            "--config.optimizer.learning_rate is 0.01 in process 3, but 0.002 in process 0",
        ),
        (
            lambda: options("training.batch_size=64"),
            "--config.training.batch_size is 64 in process 3, but 128 in process 0",
        ),
        (
            lambda: options("data.source=images:/data"),
            '--config.data.source is "images:/data" in process 3, but "digits" in process 0',
        ),
        (
            lambda: options(workdir=Path("/shared/other")),
            '--workdir is "/shared/other" in process 3, but "/shared/run" in process 0',
        ),
        (lambda: options(file=IN256), "--config.checkpoint.every_steps is 5000 in process 3, but "),
        (
            lambda: options() | {"--config.new": 1},
            "--config.new is 1 in process 3, but not known in process 0",
        ),
        (lambda: {}, '--workdir is not known in process 3, but "/shared/run" in process 0'),
    ],
)
def test_first_difference_is_named_with_both_values(here, expected):
    line = difference(here(), options(), 3)
    assert line.startswith(expected)
    assert line.endswith(REMEDY)


def test_processes_of_the_same_command_do_not_differ():
    assert difference(options("seed=7"), options("seed=7"), 1) == ""
    assert difference(this_process(), this_process(), 1) == ""


def test_folder_is_the_same_however_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    written = [tmp_path / "run", Path("run"), Path("link/run"), tmp_path / "x" / ".." / "run"]
    facts = [options(workdir=path) for path in written]
    assert {difference(each, facts[0], 1) for each in facts} == {""}
    assert nearest(Path("link/run/deeper")) == tmp_path


def test_data_of_the_same_name_that_differ_are_noticed():
    config = resolve(load(DIGITS, []), device_count=1)
    here, first = (data_identity(config, Digits(split)) for split in ("held_out", "train"))
    expected = "the number of items of digits is 360 in process 1, but 1437 in process 0"
    assert difference(here, first, 1).startswith(expected)
    assert difference(first, first, 1) == ""


def test_long_values_are_cut_in_the_line():
    line = difference({"--labels": "7," * 50_000}, {"--labels": "8," * 50_000}, 1)
    assert len(line) < 600


def refused(commands: list[list]) -> str:
    """The one line with which two commands, as processes of one run, refuse to start."""
    ended = in_two_processes(commands)
    assert [code for code, _, _ in ended] == [2, 2], ended
    lines = []
    for _, said, error in ended:
        assert "step" not in said
        lines.append([line for line in error.splitlines() if "Gloo" not in line])
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1
    return lines[0][0]


@pytest.mark.processes
def test_two_processes_with_other_seeds_do_not_start(tmp_path):
    train = ["-m", "maskdit_jax.main", f"--config={DIGITS}", f"--workdir={tmp_path / 'run'}"]
    line = refused([train, [*train, "--config.seed=1"]])
    assert line == f"error: --config.seed is 1 in process 1, but 0 in process 0: {REMEDY}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_two_processes_with_other_folders_do_not_start(tmp_path):
    train = ["-m", "maskdit_jax.main", f"--config={DIGITS}"]
    line = refused([[*train, f"--workdir={tmp_path / name}"] for name in "ab"])
    a, b = tmp_path / "a", tmp_path / "b"
    assert line == f'error: --workdir is "{b}" in process 1, but "{a}" in process 0: {REMEDY}'
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_two_processes_that_sample_other_seeds_do_not_start(tmp_path):
    sample = ["-m", "maskdit_jax.sample", f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}"]
    line = refused([[*sample, "--seeds=0-3"], [*sample, "--seeds=4-7"]])
    assert line == f'error: --seeds is "4-7" in process 1, but "0-3" in process 0: {REMEDY}'
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_every_process_says_what_is_different_in_it():
    """Two processes; also values that JSON writes in several ways, and texts of other alphabets."""
    ended = run_body(
        """
    from maskdit_jax.training.agreement import agree
    from maskdit_jax.distributed.hosts import from_all
    print(from_all(["größer" * index, index]))
    agree({"pair": (1, 2), "nan": float("nan"), "name": "größer"})
    agree({"name": "größer" * (index + 1)})
"""
    )
    for code, said, error in ended:
        assert code == 2
        assert "[['', 0], ['größer', 1]]" in said
        assert f'error: name is "größergrößer" in process 1, but "größer" in process 0: {REMEDY}' in error


@pytest.mark.processes
@needs_mount
def test_folders_of_the_same_name_on_other_disks_are_refused(tmp_path):
    """Process 1 has a disk of its own there, as on hosts that do not share it."""
    body = f"""{BODY}
    from pathlib import Path
    from maskdit_jax.training.agreement import check_same_folder
    print("same", check_same_folder("--workdir", Path("{tmp_path.parent}/new")))
    check_same_folder("--workdir", Path("{tmp_path}/run"))
"""
    mount = f"""
import os, sys
script = 'mount -t tmpfs tmpfs {tmp_path} && exec "$@"'
os.execvp("unshare", ["unshare", "-rm", "bash", "-c", script, "bash", sys.executable, *sys.argv[1:]])
"""
    several = two_process_flags()
    ended = run_all(
        [
            (["-c", body, *several, "--process_id=0"], {}),
            (["-c", mount, "-c", body, *several, "--process_id=1"], {}),
        ]
    )
    for code, said, error in ended:
        assert code == 2, error
        assert f"same {tmp_path.parent}" in said
        assert f"error: process 1 does not see the file that process 0 has left in {tmp_path}: " in error
    assert list(tmp_path.iterdir()) == []
