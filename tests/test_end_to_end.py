"""The commands, called in this process: train, start from weights, sample, and their errors."""

import json
import math
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import (
    BATCH_SIZE,
    EMA_DECAY,
    NUM_STEPS,
    PEAK_RATE,
    REPORTED,
    ROOT,
    SAVE_EVERY,
    TINY,
    WARMUP_STEPS,
    all_files,
    call_tool,
    refusal,
    restored,
    tiny_flags,
)

from maskdit_jax import evaluate, load, main, sample
from maskdit_jax.data.images import ENLARGE, to_float, to_uint8
from maskdit_jax.data.sources import Digits
from maskdit_jax.evaluation.metrics import feature_statistics, frechet_distance
from maskdit_jax.training.checkpoint import Checkpoints


def main_flags(workdir: Path, options: dict | None = None, config: str = "digits") -> list[str]:
    return [f"--workdir={workdir}", *tiny_flags(options, config)]


def assert_identical(actual, expected) -> None:
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (actual, expected)), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b), f"{jax.tree_util.keystr(path)} differs by {np.abs(a - b).max()}"


# What a run leaves behind


def test_run_prints_progress_with_both_losses_and_speed(finished):
    _, said = finished
    number = r"[\d,.]+"
    lines = re.findall(
        rf"^step (\d+)/{NUM_STEPS} · loss {number} · denoise_loss {number} · mae_loss {number} · "
        rf"grad_norm {number}(?: · ({number}) images/s · \S+ left)?$",
        said,
        re.MULTILINE,
    )
    assert [int(step) for step, _ in lines] == list(range(1, NUM_STEPS + 1))
    assert all(float(speed.replace(",", "")) > 0 for _, speed in lines[1:])
    assert re.search(rf"^finished at step {NUM_STEPS}: .*samples\.png.*card\.json", said, re.M)


def test_run_leaves_the_newest_checkpoints_previews_and_samples(run):
    kept = [NUM_STEPS - 2 * SAVE_EVERY, NUM_STEPS - SAVE_EVERY, NUM_STEPS]
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir()) == kept
    state, meta = restored(run)
    assert int(state.step) == NUM_STEPS
    assert meta["items_consumed"] == NUM_STEPS * BATCH_SIZE
    rows, columns = 10, TINY["report.preview_columns"]
    size = ((columns * 9 + 1) * ENLARGE, (rows * 9 + 1) * ENLARGE)
    for file in ("previews/step_00000004.png", "previews/step_00000008.png", "samples.png"):
        with Image.open(run / file) as image:
            assert image.size == size
            pixels = np.asarray(image)
        assert len(np.unique(pixels)) > 3
        once = pixels[::ENLARGE, ::ENLARGE]
        np.testing.assert_array_equal(np.kron(once, np.ones([ENLARGE] * 2, np.uint8)), pixels)


def test_card_holds_finite_numbers_of_the_last_step(run):
    card = json.loads((run / "card.json").read_text())
    assert card["step"] == NUM_STEPS
    assert card["num_samples"] == REPORTED["evaluation.num_samples"]
    numbers = [x for x in jax.tree.leaves(card) if not isinstance(x, str)]
    assert len(numbers) > 15
    assert all(math.isfinite(x) for x in numbers)
    assert card["classifier_accuracy_on_held_out"] > 0.95


@pytest.mark.slow
def test_tensorboard_file_holds_scalars_and_samples(run):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    for name in ("loss", "denoise_loss", "mae_loss", "grad_norm", "images_per_second", "nonfinite_total"):
        series = events.Tensors(name)
        steps = range(2 if name == "images_per_second" else 1, NUM_STEPS + 1)
        assert [event.step for event in series] == list(steps)
        values = [float(make_ndarray(event.tensor_proto)) for event in series]
        assert all(math.isfinite(x) for x in values)
        assert all(x == 0 if name == "nonfinite_total" else x > 0 for x in values)
    measured = events.Tensors("frechet_pixels_40")
    assert [event.step for event in measured] == [4, 8]
    rates = [float(make_ndarray(event.tensor_proto)) for event in events.Tensors("learning_rate")]
    assert rates == pytest.approx([PEAK_RATE * min(n / WARMUP_STEPS, 1) for n in range(1, NUM_STEPS + 1)])
    assert len(events.Tensors("mask_ratio")) == NUM_STEPS
    (text,) = events.Tensors("configuration")
    assert b"--config.optimizer.learning_rate=0.001  # after" in make_ndarray(text.tensor_proto)[0]
    (table,) = events.Tensors("parameters")
    assert b"encoder/layers/attention/qkv/kernel" in make_ndarray(table.tensor_proto)[0]
    assert [event.step for event in events.Tensors("card/guided/class_share")] == [NUM_STEPS]
    assert [event.step for event in events.Tensors("final_samples")] == [NUM_STEPS]
    images = events.Tensors("samples")
    assert [event.step for event in images] == [4, 8]
    assert make_ndarray(images[0].tensor_proto)[2].startswith(b"\x89PNG")


def test_same_command_again_says_finished_and_changes_nothing(run, capsys):
    before = all_files(run)
    main.main(main_flags(run, REPORTED))
    said = capsys.readouterr().out
    assert f"already finished: step {NUM_STEPS} of {NUM_STEPS}" in said
    assert not re.search(r"^step \d", said, re.MULTILINE)
    assert "evaluation card" in said
    assert all_files(run) == before


# Other weights, other models


@pytest.mark.slow
def test_init_from_starts_from_weights_and_ema_with_a_fresh_optimizer(run, tmp_path, capsys):
    """After one update nothing is further from the other run than one step of AdamW goes."""
    main.main(main_flags(tmp_path, {"training.num_steps": 1, "init_from": run}))
    assert f"weights and EMA from step {NUM_STEPS} of {run}" in capsys.readouterr().out
    (state, meta), (other, _) = restored(tmp_path), restored(run)
    assert int(state.step) == 1
    assert meta["items_consumed"] == BATCH_SIZE
    counts = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == np.int32]
    assert counts
    assert all(int(count) == 1 for count in counts)
    rate = PEAK_RATE / WARMUP_STEPS
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (state.params, other.params)))]
    assert 0.9 * rate < max(moved) < 1.01 * rate
    expected_ema = jax.tree.map(lambda e, p: e + (1 - EMA_DECAY) * (p - e), other.ema["ema"], state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), state.ema["ema"], expected_ema
    )
    distances = jax.tree.map(lambda e, p: np.abs(e - p).max(), other.ema["ema"], other.params)
    assert max(jax.tree.leaves(distances)) > 10 * rate  # the EMA is not the weights


def test_init_from_of_another_shape_is_refused(run, capsys, tmp_path):
    options = {"method.network.hidden_size": 32, "data.channels": 1, "init_from": run}
    error = refusal(capsys, main.main, main_flags(tmp_path / "new", options))
    assert f"the model differs from the one in {run}: method.network.hidden_size=32 here, 64 there" in error


def test_init_from_a_folder_that_is_no_run_is_refused(capsys, tmp_path):
    options = {"init_from": tmp_path / "nothing"}
    error = refusal(capsys, main.main, main_flags(tmp_path / "new", options))
    assert f"{tmp_path / 'nothing'} is not the folder of a run" in error


# Samples


def test_files_of_the_sample_command_are_the_samples_of_the_model(run, tmp_path, capsys):
    flags = [f"--workdir={run}", f"--out={tmp_path}", "--seeds=0-4,9", "--labels=7", "--cfg_scale=3"]
    sample.main([*flags, "--num_steps=3", "--format=png,npz,grid", "--batch_size=8"])
    said = capsys.readouterr().out
    assert f"6 samples of step 8 in {tmp_path}, labels class 7, 6 network calls each at cfg_scale 3" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000", "grid.png", "samples.json", "samples.npz"]
    names = [f"{seed:06d}.png" for seed in (0, 1, 2, 3, 4, 9)]
    assert sorted(p.name for p in (tmp_path / "000000").iterdir()) == names
    options = {"batch_size": 8, "cfg_scale": 3.0, "num_steps": 3}
    expected = to_uint8(load(run).sample([0, 1, 2, 3, 4, 9], [7] * 6, **options))
    written = np.load(tmp_path / "samples.npz")
    assert written["arr_0"].shape == (6, 8, 8, 1)
    np.testing.assert_array_equal(written["arr_0"], expected)
    np.testing.assert_array_equal(written["seeds"], [0, 1, 2, 3, 4, 9])
    np.testing.assert_array_equal(written["arr_1"], [7] * 6)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "000000/000009.png")), expected[5, ..., 0])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (ENLARGE * 28, ENLARGE * 19)
    np.testing.assert_array_equal(grid[::ENLARGE, ::ENLARGE][10:18, 1:9], expected[2, ..., 0])


@pytest.mark.slow
def test_an_earlier_step_guides_by_the_command(run, tmp_path):
    steps = [f"--weak={run}", "--weak_step=4", "--step=6"]
    sample.main([f"--workdir={run}", f"--out={tmp_path}", "--seeds=0-4", "--format=npz", *steps])
    expected = load(run, step=6).sample(range(5), weak=load(run, step=4))
    with np.load(tmp_path / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], to_uint8(expected))
    about = json.loads((tmp_path / "samples.json").read_text())
    assert (about["step"], about["weak"]["step"]) == (6, 4)


@pytest.mark.slow
def test_from_a_run_to_the_card_of_its_samples(run, tmp_path, monkeypatch, capsys):
    """sample → reference_stats → evaluate, as README has them."""
    out, reference = tmp_path / "samples", tmp_path / "digits.npz"
    sample.main([f"--workdir={run}", f"--out={out}", "--seeds=0-79", "--labels=random", "--format=npz"])
    flags = ("--source=digits", "--held_out", "--features=pixels", f"--out={reference}")
    call_tool(monkeypatch, "reference_stats", *flags)
    evaluate.main([f"--samples={out}", f"--reference={reference}"])
    said = capsys.readouterr().out
    card = json.loads((out / "card.json").read_text())
    held_out = to_float(to_uint8(Digits("held_out").images)).reshape(360, -1)
    with np.load(out / "samples.npz") as arrays:
        samples = to_float(arrays["arr_0"]).reshape(80, -1)
    expected = frechet_distance(*feature_statistics(held_out), *feature_statistics(samples))
    assert card["metrics"]["FID-80 (pixels)"] == pytest.approx(expected, rel=1e-6)
    assert f"FID-80 (pixels)        {expected:.4f}" in said
    about = card["samples"]
    assert (about["seeds"], about["labels"], about["step"], about["nfe"]) == ("0-79", "random", 8, 4)
    assert "held out" in card["reference"]["origin"]
    assert Image.open(out / "card.png").size[0] > 8 * 8


@pytest.mark.slow
def test_load_gives_the_ema_unless_asked_for_the_weights(run):
    state, _ = restored(run)
    assert_identical(load(run).params, state.ema["ema"])
    assert_identical(load(run, "params").params, state.params)


# Errors of a user


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"training.num_step": 3}, ["--config.training.num_step", "--config.training.num_steps"]),
        ({"training.num_steps": "ten"}, ["--config.training.num_steps=ten", "a whole number"]),
        ({"report.tensorboard": "perhaps"}, ["--config.report.tensorboard=perhaps", "true or false"]),
        ({"training.batch_size": 100}, ["training.batch_size=100", "8 devices", "96 or 104"]),
        ({"data.source": "mnist"}, ["data.source='mnist'", "digits[:FIRST-LAST[:COUNT]], latents:FOLDER"]),
        ({"data.image_size": 16}, ["data.image_size=16", "the data has 8"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_main_refuses_what_cannot_be_trained(capsys, tmp_path, options, named):
    error = refusal(capsys, main.main, main_flags(tmp_path / "run", options))
    for part in named:
        assert part in error


def test_main_names_the_configs_when_there_is_no_such_file(capsys, tmp_path):
    flags = [f"--config={ROOT / 'configs/digit.py'}", f"--workdir={tmp_path / 'run'}"]
    error = refusal(capsys, main.main, flags)
    assert "digit.py: no such" in error
    assert "digits.py" in error


def test_missing_latents_are_named_with_the_command_that_makes_them(capsys, tmp_path):
    flags = [f"--config={ROOT / 'configs/in256.py'}", "--config.report.tensorboard=false"]
    flags += [f"--config.data.source=latents:{tmp_path / 'in256'}", f"--workdir={tmp_path / 'run'}"]
    error = refusal(capsys, main.main, flags)
    assert f"no latents in '{tmp_path / 'in256'}'" in error
    assert "python tools/encode_latents.py" in error
    assert f"--out={tmp_path / 'in256'}" in error


def test_sampling_from_a_folder_that_is_no_run_is_refused(capsys, tmp_path):
    error = refusal(capsys, sample.main, [f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}"])
    assert f"{tmp_path} is not the folder of a run" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--seeds=1,two", "--seeds=1,two: expected integers up to 4294967295, such as"),
        ("--seeds=5-3", "--seeds=5-3: expected integers up to 4294967295, such as"),
        ("--seeds=0-4294967295", "4,294,967,296 numbers; at most 10,000,000"),
        ("--seeds=-4", "seeds must be one or more integers from 0"),
        ("--labels=cat", "labels=cat: expected balanced, random, a class by number or name"),
        ("--labels=1-", "--labels=1-: expected integers up to"),
        ("--labels=10", "labels 10 … 10: the model knows 0 … 9"),
        ("--labels=1,2", "2 labels for 64 seeds"),
        ("--solver=dpm", "solver='dpm' is unknown; known: heun, euler, dpmpp_2m, ddim, ancestral"),
        ("--num_steps=0", "num_steps=0 must be at least 1"),
        ("--num_steps=10001", "num_steps=10001 must be at most 10,000"),
        ("--batch_size=0", "batch_size=0: expected 1 … 65,536"),
        ("--format=jpg", "format=jpg: 'jpg' is unknown; known: png, npz, grid"),
        ("--weak_step=4", "--weak_step=4 needs --weak=FOLDER"),
        ("--step=5", "step=5: "),
        ("--guidance_interval=3", "--guidance_interval=3: expected LOW,HIGH"),
        ("--guidance_interval=", "--guidance_interval=: expected LOW,HIGH"),
        ("--rho=1e-30", "rho=1e-30: the 2 noise levels that they make do not fall"),
    ],
)
def test_sample_refuses_what_cannot_be_sampled(run, capsys, tmp_path, flag, named):
    flags = [f"--workdir={run}", f"--out={tmp_path / 'out'}", flag]
    assert named in refusal(capsys, sample.main, flags)


@pytest.fixture(scope="module")
def latents_run(finished, tmp_path_factory) -> Path:
    """The finished run as if its model made latents."""
    state, meta = restored(finished[0])
    meta["config"]["data"]["space"] = "latents"
    workdir = tmp_path_factory.mktemp("latents")
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(jax.device_get(state), meta)
    checkpoints.close()
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("name", ["png", "grid", "npz,png"])
def test_pictures_of_latents_are_refused(latents_run, capsys, tmp_path, name):
    flags = [f"--workdir={latents_run}", f"--out={tmp_path / 'out'}", f"--format={name}"]
    assert "makes latents, which have no pixels; use npz" in refusal(capsys, sample.main, flags)


@pytest.mark.slow
def test_latents_are_written_as_floats(latents_run, run, tmp_path):
    sample.main([f"--workdir={latents_run}", f"--out={tmp_path}", "--seeds=0-5"])
    written = np.load(tmp_path / "samples.npz")["arr_0"]
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, load(run).sample(range(6)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples.json", "samples.npz"]
