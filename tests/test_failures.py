"""Every kind of failure, with the real commands: the run goes on from the newest healthy step.

`outcome` collects the matrix of failures and outcomes, printed at the end of the tests.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import two_process_flags

from maskdit_jax.config import ConfigDict
from maskdit_jax.training.build import build
from maskdit_jax.training.checkpoint import open_run

ROOT = Path(__file__).parent.parent
NUM_STEPS, SHORT, SAVE_EVERY = 60, 30, 5
OPTIONS = {
    "model.hidden_size": 64,
    "model.depth": 1,
    "model.num_heads": 2,
    "model.decoder_hidden_size": 32,
    "model.decoder_depth": 1,
    "model.decoder_num_heads": 2,
    "training.num_steps": NUM_STEPS,
    "training.batch_size": 16,
    "checkpoint.every_steps": SAVE_EVERY,
    "report.every_steps": 1,
    "report.tensorboard": "false",
    "report.preview_steps": 0,
    "report.preview_columns": 1,
    "sampling.num_steps": 2,
    "sampling.solver": "euler",
    "evaluation.num_samples": 0,
}
CAN_MOUNT = shutil.which("unshare") and not subprocess.run(["unshare", "-rm", "true"]).returncode
needs_mount = pytest.mark.skipif(not CAN_MOUNT, reason="this system lets nobody mount a file system")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Programs are compiled quickly, and once for all of these commands."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def command(workdir: Path, options: dict | None = None, *more: str) -> list[str]:
    overrides = [f"--config.{name}={value}" for name, value in (OPTIONS | (options or {})).items()]
    train = [sys.executable, "-m", "maskdit_jax.main", f"--config={ROOT / 'configs/digits.py'}"]
    return [*train, f"--workdir={workdir}", *overrides, *more]


@pytest.fixture(scope="module")
def start(environment):
    """Start a training command on a number of virtual devices."""

    def start(arguments: list[str], devices: int = 1) -> subprocess.Popen:
        return subprocess.Popen(
            arguments,
            env=environment | {"JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture(scope="module")
def finish(start):
    """Run a training command to its end; what it said."""

    def finish(arguments: list[str], devices: int = 1) -> str:
        process = start(arguments, devices)
        said = process.communicate()[0]
        assert process.returncode == 0, said
        assert re.search(rf"^finished at step ({SHORT}|{NUM_STEPS}):", said, re.M)
        return said

    return finish


def state_of(workdir: Path, step: int | None = None) -> list[np.ndarray]:
    """Every array of a checkpoint, by default the newest, and the position in the data."""
    checkpoints = open_run(workdir)
    step = step or checkpoints.steps[-1]
    meta = checkpoints.meta(step)
    config = ConfigDict(meta["config"])
    config.mesh.data, config.mesh.fsdp = 1, 1
    state = checkpoints.restore(step, meta, build(config).state_shapes)
    return [np.asarray(x) for x in (*jax.tree.leaves(state), meta["items_consumed"])]


@pytest.fixture(scope="module")
def reference(finish, tmp_path_factory) -> Path:
    """A run that nothing happened to, on one device, with its states of the steps SHORT and NUM_STEPS."""
    workdir = tmp_path_factory.mktemp("reference")
    finish(command(workdir, {"checkpoint.keep_every_steps": SHORT}))
    return workdir


def difference(workdir: Path, reference: Path, step: int = NUM_STEPS) -> float:
    """Distance of the last state, which is of `step`, from the reference's, relative; 0.0: the same bits."""
    assert steps_of(workdir)[-1] == step
    state, expected = state_of(workdir), state_of(reference, step)
    assert [x.dtype for x in state] == [x.dtype for x in expected]
    if all(np.array_equal(a, b) for a, b in zip(state, expected, strict=True)):
        return 0.0
    distances = [np.linalg.norm(np.float64(a) - b) for a, b in zip(state, expected, strict=True)]
    return max(np.linalg.norm(distances) / np.linalg.norm([np.linalg.norm(b) for b in expected]), 1e-300)


def resumed_at(said: str) -> int:
    return int(re.search(r"^resumed at step (\d+) ", said, re.M)[1])


def kill_after(process: subprocess.Popen, pattern: str, delay_s: float = 0.0, number=signal.SIGKILL) -> str:
    """Send a signal `delay_s` after a line that matches; what the command said until it ended."""
    said = ""
    for line in process.stdout:
        said += line
        if re.search(pattern, line):
            break
    time.sleep(delay_s)
    process.send_signal(number)
    said += process.communicate(timeout=60)[0]
    return said


def steps_of(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdecimal())


def wait_for_step(workdir: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while max(steps_of(workdir), default=0) < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_inside_a_save(process: subprocess.Popen, workdir: Path) -> str:
    """SIGKILL while a checkpoint is half written; what the command said."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp")):
            break
    process.kill()
    return process.communicate()[0]


@pytest.mark.parametrize("group", range(4))
def test_sigkill_at_random_moments(group, start, finish, reference, tmp_path, outcome):
    """Twenty kills in four runs, two of each five inside a save: the end is the same to the last bit."""
    said = []
    for number in range(5):
        process = start(command(tmp_path))
        if number == 0:
            said.append(kill_after(process, rf"^step {random.randint(1, 9)}/", random.uniform(0, 0.05)))
        elif number % 2:
            said.append(kill_inside_a_save(process, tmp_path))
        else:
            wait_for_step(tmp_path, random.randint(*((11, 25) if number == 2 else (36, 45))))
            time.sleep(random.uniform(0, 0.05))
            process.kill()
            said.append(process.communicate()[0])
        assert process.returncode == -signal.SIGKILL, said
    said.append(finish(command(tmp_path)))
    resumed = [int(step) for text in said for step in re.findall(r"^resumed at step (\d+) ", text, re.M)]
    assert resumed == sorted(resumed)
    assert 0 < resumed[-1] < NUM_STEPS
    assert difference(tmp_path, reference) == 0
    outcome("5 × SIGKILL, 2 inside a save", f"resumed at {resumed}", "same bits")


def test_sigterm_saves_and_asks_to_be_run_again(start, finish, reference, tmp_path, outcome):
    process = start(command(tmp_path))
    said = kill_after(process, r"^step 5/", number=signal.SIGTERM)
    assert process.returncode == 75, said
    stopped = int(re.search(r"^stopped by SIGTERM at step (\d+): step \1 is saved", said, re.M)[1])
    assert 5 <= stopped < NUM_STEPS
    assert resumed_at(finish(command(tmp_path))) == stopped
    assert difference(tmp_path, reference) == 0
    outcome("SIGTERM", f"exit code 75, resumed at {stopped}", "same bits")


@contextlib.contextmanager
def two_processes(start, workdir: Path, *more: str) -> Iterator[list[subprocess.Popen]]:
    flags, options = [*two_process_flags(), *more], {"training.num_steps": SHORT}
    processes = [start(command(workdir, options, *flags, f"--process_id={i}")) for i in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("victim", [0, 1])
def test_survivor_of_a_killed_process_names_it(victim, start, finish, reference, tmp_path, outcome):
    """Killed in two processes; goes on in one."""
    with two_processes(start, tmp_path) as processes:
        wait_for_step(tmp_path, 4)
        processes[victim].kill()
        killed = time.monotonic()
        said = processes[1 - victim].communicate(timeout=60)[0]
        seconds = time.monotonic() - killed
    assert processes[1 - victim].returncode == 76, said
    assert f"error: process {victim} (pid {processes[victim].pid} on" in said
    assert "Traceback" not in said
    step = resumed_at(finish(command(tmp_path, {"training.num_steps": SHORT})))
    assert difference(tmp_path, reference, SHORT) <= 1e-5
    case = f"SIGKILL of process {victim} of 2, then 1 process"
    outcome(case, f"exit code 76 after {seconds:.1f} s, resumed at {step}", "≤ 1e-5")


def test_sigterm_to_one_of_two_processes_saves_in_both(start, reference, tmp_path, outcome):
    """The same step in both, which then go on together."""
    with two_processes(start, tmp_path) as processes:
        wait_for_step(tmp_path, 4)
        processes[1].terminate()
        said = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [75, 75], said
    stopped = [re.search(r"^stopped by SIGTERM at step (\d+): step \1 is saved", s, re.M)[1] for s in said]
    assert stopped[0] == stopped[1]
    with two_processes(start, tmp_path) as processes:
        said = [process.communicate(timeout=180)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
    assert resumed_at(said[0]) == int(stopped[0])
    assert difference(tmp_path, reference, SHORT) <= 1e-5
    outcome("SIGTERM to 1 of 2, then 2 processes", f"exit codes 75, resumed at {stopped[0]}", "≤ 1e-5")


def test_process_that_hangs_is_named(start, tmp_path, outcome):
    with two_processes(start, tmp_path, "--peer_timeout=4") as processes:
        wait_for_step(tmp_path, 4)
        processes[1].send_signal(signal.SIGSTOP)
        said = processes[0].communicate(timeout=60)[0]
    assert processes[0].returncode == 76, said
    assert f"error: process 1 (pid {processes[1].pid} on" in said
    assert "hangs: no heartbeat for 4 s" in said
    outcome("SIGSTOP of 1 of 2 (--peer_timeout=4)", "exit code 76", "message names the process")


@pytest.fixture(scope="module")
def stopped_run(start, tmp_path_factory) -> Path:
    """A run stopped half-way, with its newest three checkpoints."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    kill_after(start(command(workdir)), r"^step 11/", number=signal.SIGTERM)
    return workdir


def newest(workdir: Path) -> Path:
    return workdir / "checkpoints" / str(steps_of(workdir)[-1])


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(step: Path) -> None:
    file = largest_file(step / "params")
    os.truncate(file, file.stat().st_size // 2)


def flip_one_byte(step: Path) -> None:
    file = largest_file(step / "ema_params")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def delete_a_file(step: Path) -> None:
    largest_file(step / "opt_state").unlink()


def alter_meta(step: Path) -> None:
    file = step / "meta" / "metadata"
    file.write_text(re.sub(r'"items_consumed": ?(\d)', r'"items_consumed": 7\1', file.read_text()))


@pytest.mark.parametrize("damage", [truncate, flip_one_byte, delete_a_file, alter_meta])
def test_damaged_newest_checkpoint_is_passed_over(damage, stopped_run, finish, reference, tmp_path, outcome):
    workdir = tmp_path / "run"
    shutil.copytree(stopped_run, workdir)
    steps = steps_of(workdir)
    damage(newest(workdir))
    said = finish(command(workdir))
    assert f"passed over: checkpoint {steps[-1]} in {workdir / 'checkpoints'} is damaged: " in said
    assert resumed_at(said) == steps[-2]
    assert [p.name for p in (workdir / "damaged").iterdir()] == [f"{steps[-1]}.0"]
    assert difference(workdir, reference) == 0
    outcome(
        f"newest checkpoint: {damage.__name__.replace('_', ' ')}",
        f"step {steps[-1]} passed over, resumed at {steps[-2]}",
        "same bits",
    )


def test_run_whose_checkpoints_are_all_damaged_does_not_start_anew(stopped_run, start, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(stopped_run, workdir)
    for step in (workdir / "checkpoints").iterdir():
        delete_a_file(step)
    process = start(command(workdir))
    said = process.communicate()[0]
    assert process.returncode == 2, said
    assert f"error: none of the 3 checkpoints in {workdir / 'checkpoints'} can be read" in said
    assert len(list((workdir / "checkpoints").iterdir())) == 3


def test_every_file_of_a_checkpoint_is_guarded(stopped_run, tmp_path):
    """A flipped byte anywhere: either it is noticed, or the state is the same to the last bit."""
    expected = state_of(stopped_run)
    step = newest(stopped_run).name
    files = [p.relative_to(stopped_run) for p in newest(stopped_run).rglob("*") if p.is_file()]
    assert len(files) > 12
    noticed = 0
    for file in files:
        workdir = tmp_path / "run"
        shutil.copytree(stopped_run, workdir)
        content = bytearray((workdir / file).read_bytes())
        if content:
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        (workdir / file).write_bytes(content)
        try:
            assert all(np.array_equal(a, b) for a, b in zip(state_of(workdir), expected, strict=True)), file
        except ValueError as error:  # a DamagedError, or Orbax does not count the step any more
            assert f"checkpoint {step}" in str(error) or "no checkpoint" in str(error), file
            noticed += 1
        shutil.rmtree(workdir)
    assert noticed >= 5


@needs_mount
def test_read_only_folder_is_refused_in_one_line(
    stopped_run, environment, finish, reference, tmp_path, outcome
):
    workdir = tmp_path / "run"
    shutil.copytree(stopped_run, workdir)
    script = f'mount --bind {workdir} {workdir} && mount -o remount,ro,bind {workdir} && exec "$@"'
    process = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, "bash", *command(workdir)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2, process.stderr
    assert process.stderr == (
        f"error: cannot write to {workdir}: Read-only file system; choose another folder\n"
    )
    step = resumed_at(finish(command(workdir)))
    assert difference(workdir, reference) == 0
    outcome("read-only folder", f"exit code 2, then resumed at {step}", "same bits")


@needs_mount
def test_full_disk_fails_the_save_and_not_the_run(environment, reference, tmp_path, outcome):
    """A file system of 24 MB is filled at step 10 and has room again when a save has failed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    said = tmp_path / "said"
    script = f"""
        mount -t tmpfs -o size=24m tmpfs {disk} || exit 99
        "$@" > {said} 2>&1 &
        until grep -q '^step 10/' {said}; do sleep 0.02; done
        cat /dev/zero > {disk}/filler
        until grep -q 'could not be written' {said}; do sleep 0.05; done
        rm {disk}/filler
        wait $!; code=$?
        cp -r {disk}/run {tmp_path}/copy
        exit $code
    """
    process = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, "bash", *command(disk / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    text = said.read_text()
    assert process.returncode == 0, text + process.stderr
    failed = re.findall(r"^warning: checkpoint (\d+) could not be written: .*No space left", text, re.M)
    assert failed
    assert "Traceback" not in text
    assert difference(tmp_path / "copy", reference) == 0
    outcome(
        "full disk (tmpfs)", f"saves {', '.join(failed)} failed and were reported, run finished", "same bits"
    )


def test_another_mesh_goes_on(start, finish, reference, tmp_path, outcome):
    """From 8×1 to 2×4 devices (data × fsdp)."""
    process = start(command(tmp_path, {"mesh.data": 8}), devices=8)
    said = kill_after(process, r"^step 7/", number=signal.SIGTERM)
    assert "data 8 × fsdp 1" in said
    options = {"mesh.data": 2, "mesh.fsdp": 4, "training.num_steps": SHORT}
    said = finish(command(tmp_path, options), devices=8)
    assert "data 2 × fsdp 4" in said
    assert re.search(r"on each device: [1-9]\d* arrays cut over fsdp=4", said)
    assert difference(tmp_path, reference, SHORT) <= 1e-5
    outcome("8×1 devices, then 2×4", f"resumed at {resumed_at(said)}", "≤ 1e-5")


def test_two_runs_cannot_write_one_folder(start, tmp_path, outcome):
    first = start(command(tmp_path, {"training.num_steps": 100_000}))
    wait_for_step(tmp_path, 2)
    second = start(command(tmp_path))
    said = second.communicate()[0]
    assert second.returncode == 2, said
    assert said == (
        f"error: {tmp_path} is being written by pid {first.pid} on {socket.gethostname()}: wait for it, "
        "stop it, or choose another folder\n"
    )
    assert first.poll() is None
    first.kill()
    first.communicate()
    outcome("second run in the same folder", "exit code 2, the first goes on", "-")


def test_two_processes_sample_the_same_files_as_one(stopped_run, environment, tmp_path):
    """64 seeds: the same pictures and arrays, byte for byte, each written once."""
    flags = [f"--workdir={stopped_run}", "--seeds=0-63", "--format=png,npz,grid", "--batch_size=8"]
    sample = [sys.executable, "-m", "maskdit_jax.sample", *flags]
    environment = environment | {"JAX_NUM_CPU_DEVICES": "1"}
    one = subprocess.run(
        [*sample, f"--out={tmp_path / 'one'}"], env=environment, capture_output=True, text=True
    )
    assert one.returncode == 0, one.stderr
    several = [f"--out={tmp_path / 'two'}", *two_process_flags()]
    processes = [
        subprocess.Popen([*sample, *several, f"--process_id={i}"], env=environment, stdout=subprocess.DEVNULL)
        for i in range(2)
    ]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert len(names) == 66
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == names
    for name in names:
        if name.endswith(".png"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    with np.load(tmp_path / "one/samples.npz") as a, np.load(tmp_path / "two/samples.npz") as b:
        for key in ("samples", "seeds", "labels"):
            np.testing.assert_array_equal(a[key], b[key])
