"""What a run leaves to be read: its options, its starts, its messages, its numbers."""

import json
import re
import sys

import jax
import numpy as np
import pytest
from tiny import BATCH_SIZE, NUM_STEPS, PEAK_RATE, REPORTED, WARMUP_STEPS, tiny_config, tiny_flags

import maskdit_jax
from maskdit_jax import main
from maskdit_jax.errors import UserError
from maskdit_jax.log import log
from maskdit_jax.training.run_folder import RunFolder, commit
from maskdit_jax.training.sinks import MetricsFile, Sinks, open_boards


def lines_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_options_and_the_start_of_a_run_are_in_its_folder(run):
    assert json.loads((run / "config.json").read_text()) == tiny_config(REPORTED).to_dict()
    (start,) = lines_of(run / "starts.jsonl")
    assert start["step"] == 0
    assert start["command"] == [sys.executable, *sys.argv]
    assert start["versions"]["jax"] == jax.__version__
    assert start["versions"]["maskdit_jax"] == maskdit_jax.__version__
    assert start["commit"] is None or re.fullmatch(r"[0-9a-f]{40}( with changes)?", start["commit"])
    assert bool(start["commit"]) == bool(commit())


def test_messages_of_a_run_have_times_in_its_log(run):
    said = (run / "log.txt").read_text().splitlines()
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d step (\d)/8 · loss .*"
    steps = [re.fullmatch(line, each) for each in said]
    assert [int(match[1]) for match in steps if match] == list(range(1, NUM_STEPS + 1))
    assert any("parameters ·" in each for each in said)  # said before the run began


def test_numbers_of_every_report_line_are_in_one_file(run):
    """The learning rate, the mask ratio and the time beside what the console shows."""
    lines = lines_of(run / "metrics.jsonl")
    reports = [line for line in lines if "loss" in line]
    assert [line["step"] for line in reports] == list(range(1, NUM_STEPS + 1))
    for line in reports:
        rate = PEAK_RATE * min(line["step"] / WARMUP_STEPS, 1)
        assert line["learning_rate"] == pytest.approx(rate)
        assert line["kimg"] == line["step"] * BATCH_SIZE / 1000
        assert line["mask_ratio"] == 0.5
        assert {"denoise_loss", "mae_loss", "grad_norm", "nonfinite_total", "seconds"} <= set(line)
    assert np.all(np.diff([line["seconds"] for line in reports]) > 0)
    assert all(line["images_per_second"] > 0 for line in reports[1:])
    assert [line["step"] for line in lines if "frechet_pixels_40" in line] == [4, 8]


def test_steps_that_are_made_again_are_there_once(tmp_path):
    """The steps after the checkpoint, and a line that a kill cut in two."""
    file = tmp_path / "metrics.jsonl"
    first = MetricsFile(file, 0)
    for step in (2, 4, 6):
        first.write_scalars(step, {"loss": step / 2, "never": float("nan")})
    first.close()
    with file.open("a") as cut:
        cut.write('{"step": 7, "lo')
    again = MetricsFile(file, 4)
    again.write_scalars(6, {"loss": 9.0})
    again.close()
    assert lines_of(file) == [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 2.0}, {"step": 6, "loss": 9.0}]


def test_a_run_that_ends_with_an_error_has_it_in_its_log_and_a_refused_one_leaves_nothing(tmp_path):
    config = tiny_config()
    for begins in (False, True):
        with pytest.raises(UserError), RunFolder(tmp_path) as folder:
            log.warning("before")
            if begins:
                folder.begin(config, 3)
            raise UserError("it diverged")
        assert bool(list(tmp_path.iterdir())) == begins
    said = (tmp_path / "log.txt").read_text()
    assert re.fullmatch(r"\S+ \S+ before\n\S+ \S+ error: it diverged\n", said)
    assert [start["step"] for start in lines_of(tmp_path / "starts.jsonl")] == [3]


def test_a_sink_that_fails_does_not_end_the_run(tmp_path, messages, caplog):
    closed = MetricsFile(tmp_path / "metrics.jsonl", 0)
    closed.close()
    Sinks([closed]).scalars(1, {"loss": 1.0})
    assert "MetricsFile could not be written: " in caplog.text


def test_weights_and_biases_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = tiny_config({"report.wandb": "digits", "report.tensorboard": "true"})
    with pytest.raises(UserError, match=r"report\.wandb=digits needs wandb: pip install '\.\[wandb\]'"):
        open_boards(tmp_path, config)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_weights_and_biases_offline_is_one_run_for_all_starts(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (1, 2):
        options = {"report.wandb": "digits", "report.preview_steps": 1, "training.num_steps": steps}
        main.main([f"--workdir={tmp_path}", *tiny_flags(options)])
    records = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "wandb" / "run_id").read_text()
    assert len(records) >= 2
    assert {file.name for file in records} == {f"run-{run_id}.wandb"}
    written = b"".join(file.read_bytes() for file in records)
    assert all(word in written for word in (b"learning_rate", b"optimizer.clip_norm", b"final_samples"))
