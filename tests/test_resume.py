"""Runs that were stopped, moved or damaged, in this process: they go on as if nothing had happened."""

import logging
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from tiny import (
    NUM_STEPS,
    RECIPES,
    SAVE_EVERY,
    arrays_of,
    difference,
    flip_one_byte,
    largest_file,
    refusal,
    steps_of,
    tiny_flags,
)

from maskdit_jax import main
from maskdit_jax.distributed.hosts import PREEMPTED
from maskdit_jax.training.checkpoint import DamagedError


def train(workdir: Path, options: dict | None = None, recipe: str = "digits") -> None:
    main.main([f"--workdir={workdir}", *tiny_flags(options, recipe)])


class TerminatedAt(logging.Handler):
    """SIGTERM to this process when the package says something that matches."""

    def __init__(self, pattern: str):
        super().__init__()
        self.pattern = pattern

    def emit(self, record: logging.LogRecord) -> None:
        if re.match(self.pattern, record.getMessage()):
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The finished run, to spoil."""
    shutil.copytree(run / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


@pytest.fixture
def stop(tmp_path, monkeypatch):
    """Train a recipe until SIGTERM at an odd step, at which no checkpoint is due: its folder, that step."""

    def stop(recipe: str) -> tuple[Path, int]:
        log, handler = logging.getLogger("maskdit_jax"), TerminatedAt(r"step 3/")
        monkeypatch.setattr(main, "log_to_stdout", lambda: log.addHandler(handler))
        log.setLevel(logging.INFO)
        with pytest.raises(SystemExit) as end:
            train(tmp_path / "run", {"checkpoint.every_steps": NUM_STEPS}, recipe)
        monkeypatch.undo()
        log.removeHandler(handler)
        assert end.value.code == PREEMPTED
        (step,) = steps_of(tmp_path / "run")
        assert 3 <= step < NUM_STEPS
        return tmp_path / "run", step

    return stop


@pytest.mark.parametrize(
    "recipe", [RECIPES[0], *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in RECIPES[1:])]
)
def test_stopped_and_resumed_run_ends_with_the_same_bits(stop, run, recipe, tmp_path, capsys):
    if recipe != "digits":  # which `run` is
        run = tmp_path / "whole"
        train(run, {}, recipe)
    workdir, step = stop(recipe)
    train(workdir, {"checkpoint.every_steps": NUM_STEPS}, recipe)
    assert f"resumed at step {step} " in capsys.readouterr().out
    assert difference(arrays_of(workdir), arrays_of(run)) == 0


@pytest.mark.slow
def test_run_goes_on_on_another_mesh(stop, run, capsys):
    """From 8×1 to 2×4 devices (data × fsdp)."""
    workdir, step = stop("digits")
    train(workdir, {"mesh.data": 2, "mesh.fsdp": 4, "checkpoint.every_steps": NUM_STEPS})
    said = capsys.readouterr().out
    assert f"resumed at step {step} " in said
    assert "data 2 × fsdp 4" in said
    assert re.search(r"on each device: [1-9]\d* arrays cut over fsdp=4", said)
    assert 0 <= difference(arrays_of(workdir), arrays_of(run)) <= 1e-5


def truncate(item: Path) -> None:
    file = largest_file(item)
    os.truncate(file, file.stat().st_size // 2)


def delete_a_file(item: Path) -> None:
    largest_file(item).unlink()


def alter_meta(item: Path) -> None:
    file = item / "metadata"
    file.write_text(re.sub(r'"items_consumed": ?(\d)', r'"items_consumed": 7\1', file.read_text()))


@pytest.mark.slow
def test_damaged_newest_checkpoint_is_passed_over_and_made_again(copy, run, capsys):
    """The steps after the one before are trained again, to the same bits."""
    newest, before = NUM_STEPS, NUM_STEPS - SAVE_EVERY
    flip_one_byte(copy / f"checkpoints/{newest}/ema_params")
    train(copy)
    said = capsys.readouterr().out
    assert f"passed over: checkpoint {newest} in {copy / 'checkpoints'} is damaged: ema_params: " in said
    assert f"resumed at step {before} " in said
    assert [p.name for p in (copy / "damaged").iterdir()] == [f"{newest}.0"]
    assert difference(arrays_of(copy), arrays_of(run)) == 0


@pytest.mark.parametrize(
    ("damage", "item"),
    [
        (truncate, "params"),
        (flip_one_byte, "params"),
        (flip_one_byte, "opt_state"),
        (delete_a_file, "opt_state"),
        (flip_one_byte, "counters"),
        (alter_meta, "meta"),
        (truncate, "meta"),
    ],
)
def test_every_item_of_a_checkpoint_is_guarded(damage, item, copy):
    damage(copy / f"checkpoints/{NUM_STEPS}/{item}")
    with pytest.raises(DamagedError, match=f"checkpoint {NUM_STEPS} in .* is damaged: {item}: "):
        arrays_of(copy, NUM_STEPS)


def test_run_whose_checkpoints_are_all_damaged_does_not_start_anew(copy, capsys):
    for step in (copy / "checkpoints").iterdir():
        alter_meta(step / "meta")
    error = refusal(capsys, train, copy)
    assert f"none of the 3 checkpoints in {copy / 'checkpoints'} can be read" in error
    assert len(steps_of(copy)) == 3


def test_resuming_with_another_model_is_refused_and_touches_no_checkpoint(copy, capsys):
    error = refusal(capsys, train, copy, {"method.network.depth": 3})
    assert (
        f"the model differs from the one in {copy / 'checkpoints'}: method.network.depth=3 here, 2 there"
        in error
    )
    assert steps_of(copy) == [NUM_STEPS - 2 * SAVE_EVERY, NUM_STEPS - SAVE_EVERY, NUM_STEPS]
    assert len(arrays_of(copy)) > 100


@pytest.mark.slow
def test_training_that_stays_non_finite_stops_and_leaves_the_last_good_checkpoint(copy, capsys):
    """An update that ruins the weights: no checkpoint holds what came after."""
    before = arrays_of(copy)
    options = {
        "training.num_steps": NUM_STEPS + 20,
        "training.max_nonfinite_steps": 3,
        "optimizer.learning_rate": 1e30,
        "checkpoint.every_steps": 2,
    }
    error = refusal(capsys, train, copy, options)
    assert "not finite in 3 steps in a row (training.max_nonfinite_steps=3)" in error
    assert "optimizer.learning_rate" in error
    assert f"checkpoint {NUM_STEPS} is intact" in error
    assert all(np.array_equal(a, b) for a, b in zip(arrays_of(copy), before, strict=True))
