"""The commands as a user runs them: train, start from weights, sample, and their errors."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from maskdit_jax import load, main, sample
from maskdit_jax.config import ConfigDict
from maskdit_jax.data.images import to_uint8
from maskdit_jax.training.build import build
from maskdit_jax.training.checkpoint import Checkpoints, open_run
from maskdit_jax.training.report import PREVIEW_ENLARGE
from maskdit_jax.training.state import TrainState

ROOT = Path(__file__).parent.parent
NUM_STEPS, BATCH_SIZE, SAVE_EVERY, PEAK_RATE, WARMUP_STEPS, EMA_DECAY = 30, 16, 3, 1e-3, 10, 0.9
TINY = {
    "model.hidden_size": 32,
    "model.depth": 1,
    "model.num_heads": 2,
    "model.decoder_hidden_size": 16,
    "model.decoder_depth": 1,
    "model.decoder_num_heads": 2,
    "training.num_steps": NUM_STEPS,
    "training.batch_size": BATCH_SIZE,
    "training.ema_decay": EMA_DECAY,
    "optimizer.learning_rate": PEAK_RATE,
    "optimizer.warmup_kimg": WARMUP_STEPS * BATCH_SIZE / 1000,
    "checkpoint.every_steps": SAVE_EVERY,
    "report.every_steps": 1,
    "report.tensorboard": "false",
    "report.preview_steps": 0,
    "report.preview_columns": 2,
    "sampling.num_steps": 2,
    "sampling.solver": "euler",
    "evaluation.num_samples": 0,
}
REPORTED = {"report.tensorboard": "true", "report.preview_steps": 15, "evaluation.num_samples": 40}


def main_flags(workdir: Path, options: dict | None = None, config: str = "digits") -> list[str]:
    overrides = [f"--config.{name}={value}" for name, value in (options or {}).items()]
    return [f"--config={ROOT / 'configs' / config}.py", f"--workdir={workdir}", *overrides]


def command(module: str, flags: list[str]) -> list[str]:
    return [sys.executable, "-m", f"maskdit_jax.{module}", *flags]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """One CPU device. Compiling, what these tests mostly wait for, is quick and done once for all of them."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def execute(environment):
    """Run a command of the package to its end."""

    def execute(module: str, flags: list[str]) -> subprocess.CompletedProcess:
        return subprocess.run(command(module, flags), env=environment, capture_output=True, text=True)

    return execute


@pytest.fixture(scope="module")
def finished(execute, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A finished run that reported everything: its folder and what the command said."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, execute("main", main_flags(workdir, TINY | REPORTED))


@pytest.fixture
def run(finished) -> Path:
    """Folder of the finished run."""
    workdir, process = finished
    assert process.returncode == 0, process.stderr
    return workdir


@pytest.fixture(autouse=True)
def _restore_logging():
    log = logging.getLogger("maskdit_jax")
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


def restored(workdir: Path) -> tuple[TrainState, dict]:
    """Newest state and metadata of a run, on the devices of this process."""
    checkpoints = open_run(workdir)
    meta = checkpoints.meta(checkpoints.steps[-1])
    config = ConfigDict(meta["config"])
    config.mesh.data, config.mesh.fsdp = jax.device_count(), 1
    state = checkpoints.restore(checkpoints.steps[-1], meta, build(config).state_shapes)
    checkpoints.close()
    return state, meta


def assert_identical(actual, expected) -> None:
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (actual, expected)), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b), f"{jax.tree_util.keystr(path)} differs by {np.abs(a - b).max()}"


def all_files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """When every file of a folder was written, and what is in it."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def assert_one_line_error(code: int, stderr: str) -> None:
    assert code == 2, stderr
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert len(stderr.splitlines()) == 1, stderr
    assert "Traceback" not in stderr


def error_of(capsys, entry, flags: list[str]) -> str:
    """The line on stderr with which a command, called here, refuses its flags."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        entry(flags)
    stderr = capsys.readouterr().err
    assert_one_line_error(stopped.value.code, stderr)
    return stderr


# What a run leaves behind


def test_run_prints_progress_with_both_losses_and_speed(finished):
    _, process = finished
    assert process.returncode == 0, process.stderr
    number = r"[\d,.]+"
    lines = re.findall(
        rf"^step (\d+)/{NUM_STEPS} · loss {number} · denoise_loss {number} · mae_loss {number} · "
        rf"grad_norm {number}(?: · ({number}) images/s · \S+ left)?$",
        process.stdout,
        re.MULTILINE,
    )
    assert [int(step) for step, _ in lines] == list(range(1, NUM_STEPS + 1))
    assert all(float(speed.replace(",", "")) > 0 for _, speed in lines[1:])
    assert re.search(rf"^finished at step {NUM_STEPS}: .*samples\.png.*card\.json", process.stdout, re.M)


def test_run_leaves_the_newest_checkpoints_previews_and_samples(run):
    kept = [NUM_STEPS - 2 * SAVE_EVERY, NUM_STEPS - SAVE_EVERY, NUM_STEPS]
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir()) == kept
    state, meta = restored(run)
    assert int(state.step) == NUM_STEPS
    assert meta["items_consumed"] == NUM_STEPS * BATCH_SIZE
    rows, columns = 10, TINY["report.preview_columns"]
    size = ((columns * 9 + 1) * PREVIEW_ENLARGE, (rows * 9 + 1) * PREVIEW_ENLARGE)
    for file in ("previews/step_00000015.png", "previews/step_00000030.png", "samples.png"):
        with Image.open(run / file) as image:
            assert image.size == size
            pixels = np.asarray(image)
        assert len(np.unique(pixels)) > 3
        once = pixels[::PREVIEW_ENLARGE, ::PREVIEW_ENLARGE]
        np.testing.assert_array_equal(np.kron(once, np.ones([PREVIEW_ENLARGE] * 2, np.uint8)), pixels)


def test_card_holds_finite_numbers_of_the_last_step(run):
    card = json.loads((run / "card.json").read_text())
    assert card["step"] == NUM_STEPS
    assert card["num_samples"] == REPORTED["evaluation.num_samples"]
    numbers = [x for x in jax.tree.leaves(card) if not isinstance(x, str)]
    assert len(numbers) > 15
    assert all(math.isfinite(x) for x in numbers)
    assert card["classifier_accuracy_on_held_out"] > 0.95


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
    images = events.Tensors("samples")
    assert [event.step for event in images] == [15, 30]
    assert make_ndarray(images[0].tensor_proto)[2].startswith(b"\x89PNG")


def test_same_command_again_says_finished_and_changes_nothing(run, execute):
    before = all_files(run)
    process = execute("main", main_flags(run, TINY | REPORTED))
    assert process.returncode == 0, process.stderr
    assert f"already finished: step {NUM_STEPS} of {NUM_STEPS}" in process.stdout
    assert not re.search(r"^step \d", process.stdout, re.MULTILINE)
    assert "evaluation card" in process.stdout
    assert all_files(run) == before


# Other weights, other models


def test_init_from_starts_from_weights_and_ema_with_a_fresh_optimizer(run, execute, tmp_path):
    """After one update nothing is further from the other run than one step of AdamW goes."""
    options = TINY | {"training.num_steps": 1, "init_from": run}
    process = execute("main", main_flags(tmp_path, options))
    assert process.returncode == 0, process.stderr
    assert f"weights and EMA from step {NUM_STEPS} of {run}" in process.stdout
    (state, meta), (other, _) = restored(tmp_path), restored(run)
    assert int(state.step) == 1
    assert meta["items_consumed"] == BATCH_SIZE
    counts = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == np.int32]
    assert counts
    assert all(int(count) == 1 for count in counts)
    rate = PEAK_RATE / WARMUP_STEPS
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (state.params, other.params)))]
    assert 0.9 * rate < max(moved) < 1.01 * rate
    expected_ema = jax.tree.map(lambda e, p: e + (1 - EMA_DECAY) * (p - e), other.ema_params, state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), state.ema_params, expected_ema
    )
    distances = jax.tree.map(lambda e, p: np.abs(e - p).max(), other.ema_params, other.params)
    assert max(jax.tree.leaves(distances)) > 10 * rate  # the EMA is not the weights


def test_init_from_of_another_shape_is_refused(run, capsys, tmp_path):
    options = TINY | {"model.hidden_size": 64, "model.channels": 1, "init_from": run}
    error = error_of(capsys, main.main, main_flags(tmp_path / "new", options))
    assert f"the model differs from the one in {run}: hidden_size=64 here, 32 there" in error


def test_init_from_a_folder_that_is_no_run_is_refused(capsys, tmp_path):
    options = TINY | {"init_from": tmp_path / "nothing"}
    error = error_of(capsys, main.main, main_flags(tmp_path / "new", options))
    assert f"{tmp_path / 'nothing'} is not the folder of a run" in error


def test_resuming_with_another_model_is_refused_and_touches_no_checkpoint(run, capsys):
    before = all_files(run)
    error = error_of(capsys, main.main, main_flags(run, TINY | {"model.depth": 2}))
    assert f"the model differs from the one in {run / 'checkpoints'}: depth=2 here, 1 there" in error
    assert all_files(run) == before


def test_training_that_stays_non_finite_stops_and_leaves_the_last_good_checkpoint(execute, tmp_path):
    """Six good steps, then an update that ruins the weights: no checkpoint holds what came after."""
    good = TINY | {"model.use_decoder": "false", "diffusion.mae_coef": 0, "training.num_steps": 6}
    assert execute("main", main_flags(tmp_path, good)).returncode == 0
    before, _ = restored(tmp_path)
    ruinous = {
        "training.num_steps": 30,
        "training.max_nonfinite_steps": 5,
        "optimizer.learning_rate": 1e30,
        "checkpoint.every_steps": 4,
    }
    process = execute("main", main_flags(tmp_path, good | ruinous))
    assert_one_line_error(process.returncode, process.stderr)
    assert "not finite in 5 steps in a row (training.max_nonfinite_steps=5)" in process.stderr
    assert "optimizer.learning_rate" in process.stderr
    assert "checkpoint 6 is intact" in process.stderr
    assert_identical(restored(tmp_path)[0], before)


# Samples


def test_sample_command_writes_the_same_files_in_every_process(run, execute, tmp_path):
    flags = [f"--workdir={run}", "--seeds=0-4,9", "--format=png,npz,grid", "--batch_size=8"]
    for name in "ab":
        process = execute("sample", [*flags, f"--out={tmp_path / name}"])
        assert process.returncode == 0, process.stderr
        assert "wrote 6 samples (png, npz, grid)" in process.stdout
    names = [f"{seed:06d}.png" for seed in (0, 1, 2, 3, 4, 9)] + ["grid.png", "samples.npz"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.png")} for n in "ab")
    assert first == second
    assert len(set(first.values())) == len(first)
    arrays = [np.load(tmp_path / name / "samples.npz") for name in "ab"]
    for key in ("samples", "seeds", "labels"):
        np.testing.assert_array_equal(arrays[0][key], arrays[1][key])


def test_files_of_the_sample_command_are_the_samples_of_the_model(run, tmp_path):
    flags = [f"--workdir={run}", f"--out={tmp_path}", "--seeds=0-4,9", "--labels=7", "--cfg_scale=3"]
    sample.main([*flags, "--num_steps=3", "--format=png,npz,grid", "--batch_size=8"])
    options = {"batch_size": 8, "cfg_scale": 3.0, "num_steps": 3}
    expected = to_uint8(load(run).sample([0, 1, 2, 3, 4, 9], [7] * 6, **options))
    written = np.load(tmp_path / "samples.npz")
    assert written["samples"].shape == (6, 8, 8, 1)
    np.testing.assert_array_equal(written["samples"], expected)
    np.testing.assert_array_equal(written["seeds"], [0, 1, 2, 3, 4, 9])
    np.testing.assert_array_equal(written["labels"], [7] * 6)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "000009.png")), expected[5, ..., 0])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (28, 19)
    np.testing.assert_array_equal(grid[10:18, 1:9], expected[2, ..., 0])


def test_samples_of_a_run_agree_at_batch_sizes_1_7_and_64(run):
    model = load(run)
    seeds = range(9)
    reference = model.sample(seeds, batch_size=64)
    assert np.abs(reference - reference.mean(axis=0)).max() > 1e-2
    for batch_size in (1, 7):
        np.testing.assert_allclose(model.sample(seeds, batch_size=batch_size), reference, rtol=0, atol=1e-5)


def test_load_gives_the_ema_unless_asked_for_the_weights(run):
    state, _ = restored(run)
    assert_identical(load(run).params, state.ema_params)
    assert_identical(load(run, "params").params, state.params)


# Errors of a user


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"training.num_step": 3}, ["--config.training.num_step", "--config.training.num_steps"]),
        ({"training.num_steps": "ten"}, ["--config.training.num_steps=ten", "a whole number"]),
        ({"report.tensorboard": "perhaps"}, ["--config.report.tensorboard=perhaps", "true or false"]),
        ({"training.batch_size": 100}, ["training.batch_size=100", "8 devices", "96 or 104"]),
        ({"data.source": "mnist"}, ["data.source='mnist'", "digits, latents:FOLDER"]),
        ({"model.image_size": 16}, ["model.image_size=16", "the data has 8"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_main_refuses_what_cannot_be_trained(capsys, tmp_path, options, named):
    error = error_of(capsys, main.main, main_flags(tmp_path / "run", TINY | options))
    for part in named:
        assert part in error


def test_main_names_the_configs_when_there_is_no_such_file(capsys, tmp_path):
    error = error_of(capsys, main.main, main_flags(tmp_path / "run", config="digit"))
    assert "digit.py: no such" in error
    assert "digits.py" in error


def test_missing_latents_are_named_with_the_command_that_makes_them(execute, tmp_path):
    options = {"data.source": f"latents:{tmp_path / 'in256'}", "report.tensorboard": "false"}
    process = execute("main", main_flags(tmp_path / "run", options, config="in256"))
    assert_one_line_error(process.returncode, process.stderr)
    assert f"no latents in '{tmp_path / 'in256'}'" in process.stderr
    assert "python tools/encode_latents.py" in process.stderr
    assert f"--out={tmp_path / 'in256'}" in process.stderr


def test_sampling_from_a_folder_that_is_no_run_is_refused(execute, tmp_path):
    process = execute("sample", [f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}"])
    assert_one_line_error(process.returncode, process.stderr)
    assert f"{tmp_path} is not the folder of a run" in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--seeds=1,two", "--seeds=1,two: expected integers such as"),
        ("--seeds=5-3", "--seeds=5-3: expected integers such as"),
        ("--seeds=-4", "seeds must be one or more integers from 0"),
        ("--labels=cat", "--labels=cat: expected integers such as"),
        ("--labels=10", "labels 10 … 10: the model knows 0 … 9"),
        ("--labels=1,2", "2 labels for 64 seeds"),
        ("--solver=dpm", "solver='dpm' is unknown; known: heun, euler"),
        ("--num_steps=0", "num_steps=0 must be at least 1"),
        ("--batch_size=0", "--batch_size=0 must be at least 1"),
        ("--format=jpg", "--format=jpg: 'jpg' is unknown; known: png, npz, grid"),
        ("--guidance_interval=3", "--guidance_interval=3: expected LOW,HIGH"),
    ],
)
def test_sample_refuses_what_cannot_be_sampled(run, capsys, tmp_path, flag, named):
    flags = [f"--workdir={run}", f"--out={tmp_path / 'out'}", flag]
    assert named in error_of(capsys, sample.main, flags)


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


@pytest.mark.parametrize("name", ["png", "grid", "npz,png"])
def test_pictures_of_latents_are_refused(latents_run, capsys, tmp_path, name):
    flags = [f"--workdir={latents_run}", f"--out={tmp_path / 'out'}", f"--format={name}"]
    assert "makes latents, which have no pixels; use npz" in error_of(capsys, sample.main, flags)


def test_latents_are_written_as_floats(latents_run, run, tmp_path):
    sample.main([f"--workdir={latents_run}", f"--out={tmp_path}", "--seeds=0-5"])
    written = np.load(tmp_path / "samples.npz")["samples"]
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, load(run).sample(range(6)))
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]
