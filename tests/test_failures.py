"""Every kind of failure, with the real commands: the run goes on from the newest healthy step.

`outcome` collects the matrix of failures and outcomes, printed at the end of the tests.
"""

import contextlib
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

import pytest
from processes import two_process_flags
from tiny import RECIPES, arrays_of, command_environment, flip_one_byte, steps_of, tiny_flags
from tiny import difference as distance

pytestmark = pytest.mark.processes
NUM_STEPS, SHORT, SAVE_EVERY = 60, 30, 5
OPTIONS = {
    "training.num_steps": NUM_STEPS,
    "checkpoint.every_steps": SAVE_EVERY,
    "report.preview_columns": 1,
}
CAN_MOUNT = shutil.which("unshare") and not subprocess.run(["unshare", "-rm", "true"]).returncode
needs_mount = pytest.mark.skipif(not CAN_MOUNT, reason="this system lets nobody mount a file system")


def command(workdir: Path, options: dict | None = None, *more: str, recipe: str = "digits") -> list[str]:
    train = [sys.executable, "-m", "maskdit_jax.main", *tiny_flags(OPTIONS | (options or {}), recipe)]
    return [*train, f"--workdir={workdir}", *more]


def start(arguments: list[str], devices: int = 1) -> subprocess.Popen:
    """Start a training command on a number of virtual devices."""
    return subprocess.Popen(
        arguments,
        env=command_environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(arguments: list[str], devices: int = 1) -> str:
    """Run a training command to its end; what it said."""
    process = start(arguments, devices)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert re.search(rf"^finished at step ({SHORT}|{NUM_STEPS}):", said, re.M)
    return said


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A run that nothing happened to, on one device, with its states of the steps SHORT and NUM_STEPS."""
    workdir = tmp_path_factory.mktemp("reference")
    finish(command(workdir, {"checkpoint.keep_every_steps": SHORT}))
    return workdir


def difference(workdir: Path, reference: Path, step: int = NUM_STEPS) -> float:
    """Distance of the last state, which is of `step`, from the reference's, relative; 0.0: the same bits."""
    assert steps_of(workdir)[-1] == step
    return distance(arrays_of(workdir), arrays_of(reference, step))


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


@pytest.mark.parametrize("recipe", RECIPES)
def test_sigkill_at_random_moments(recipe, reference, tmp_path, outcome):
    """Five kills, two of them inside a save: the end is the same to the last bit."""
    if recipe != "digits":
        reference = tmp_path / "reference"
        finish(command(reference, recipe=recipe))
    workdir = tmp_path / "run"
    seed = random.SystemRandom().randrange(10_000)
    print(f"seed {seed}")  # pytest shows it with a failure
    moments = random.Random(seed)
    said = []
    for number in range(5):
        process = start(command(workdir, recipe=recipe))
        if number == 0:
            said.append(kill_after(process, rf"^step {moments.randint(1, 9)}/", moments.uniform(0, 0.05)))
        elif number % 2:
            said.append(kill_inside_a_save(process, workdir))
        else:
            wait_for_step(workdir, moments.randint(*((11, 25) if number == 2 else (36, 45))))
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
            said.append(process.communicate()[0])
        assert process.returncode == -signal.SIGKILL, said
    said.append(finish(command(workdir, recipe=recipe)))
    resumed = [int(step) for text in said for step in re.findall(r"^resumed at step (\d+) ", text, re.M)]
    assert resumed == sorted(resumed)
    assert 0 < resumed[-1] < NUM_STEPS
    assert difference(workdir, reference) == 0
    outcome(f"{recipe}: 5 × SIGKILL, 2 inside a save (seed {seed})", f"resumed at {resumed}", "same bits")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_stopped_run_is_saved_and_asks_to_be_run_again(reference, tmp_path, outcome, number, name):
    process = start(command(tmp_path))
    said = kill_after(process, r"^step 5/", number=number)
    assert process.returncode == 75, said
    stopped = int(re.search(rf"^stopped by {name} at step (\d+): step \1 is saved", said, re.M)[1])
    assert 5 <= stopped < NUM_STEPS
    assert resumed_at(finish(command(tmp_path))) == stopped
    assert difference(tmp_path, reference) == 0
    outcome(name, f"exit code 75, resumed at {stopped}", "same bits")


@contextlib.contextmanager
def two_processes(workdir: Path, *more: str) -> Iterator[list[subprocess.Popen]]:
    flags, options = [*two_process_flags(), *more], {"training.num_steps": SHORT}
    processes = [start(command(workdir, options, *flags, f"--process_id={i}")) for i in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_survivor_of_a_killed_process_names_it(reference, tmp_path, outcome):
    """Killed in two processes the one that the other listens to; goes on in one."""
    with two_processes(tmp_path) as (victim, survivor):
        wait_for_step(tmp_path, 4)
        victim.kill()
        killed = time.monotonic()
        said = survivor.communicate(timeout=60)[0]
        seconds = time.monotonic() - killed
    assert survivor.returncode == 76, said
    assert f"error: process 0 (pid {victim.pid} on" in said
    assert "Traceback" not in said
    step = resumed_at(finish(command(tmp_path, {"training.num_steps": SHORT})))
    assert difference(tmp_path, reference, SHORT) <= 1e-5
    case = "SIGKILL of process 0 of 2, then 1 process"
    outcome(case, f"exit code 76 after {seconds:.1f} s, resumed at {step}", "≤ 1e-5")


def test_sigterm_to_one_of_two_processes_saves_in_both(reference, tmp_path, outcome):
    """The same step in both, which then go on together."""
    with two_processes(tmp_path) as processes:
        wait_for_step(tmp_path, 4)
        processes[1].terminate()
        said = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [75, 75], said
    stopped = [re.search(r"^stopped by SIGTERM at step (\d+): step \1 is saved", s, re.M)[1] for s in said]
    assert stopped[0] == stopped[1]
    with two_processes(tmp_path) as processes:
        said = [process.communicate(timeout=180)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
    assert resumed_at(said[0]) == int(stopped[0])
    assert difference(tmp_path, reference, SHORT) <= 1e-5
    outcome("SIGTERM to 1 of 2, then 2 processes", f"exit codes 75, resumed at {stopped[0]}", "≤ 1e-5")


def test_process_that_hangs_is_named(tmp_path, outcome):
    with two_processes(tmp_path, "--peer_timeout=4") as processes:
        wait_for_step(tmp_path, 4)
        processes[1].send_signal(signal.SIGSTOP)
        said = processes[0].communicate(timeout=60)[0]
    assert processes[0].returncode == 76, said
    assert f"error: process 1 (pid {processes[1].pid} on" in said
    assert "hangs: no heartbeat for 4 s" in said
    outcome("SIGSTOP of 1 of 2 (--peer_timeout=4)", "exit code 76", "message names the process")


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory) -> Path:
    """A run stopped half-way, with its newest three checkpoints."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    kill_after(start(command(workdir)), r"^step 11/", number=signal.SIGTERM)
    return workdir


def test_damaged_newest_checkpoint_is_passed_over(stopped_run, reference, tmp_path, outcome):
    """Other damage: test_resume.py."""
    workdir = tmp_path / "run"
    shutil.copytree(stopped_run, workdir)
    steps = steps_of(workdir)
    flip_one_byte(workdir / f"checkpoints/{steps[-1]}/ema_params")
    said = finish(command(workdir))
    assert f"passed over: checkpoint {steps[-1]} in {workdir / 'checkpoints'} is damaged: " in said
    assert resumed_at(said) == steps[-2]
    assert difference(workdir, reference) == 0
    outcome(
        "newest checkpoint: a flipped byte",
        f"step {steps[-1]} passed over, resumed at {steps[-2]}",
        "same bits",
    )


@needs_mount
def test_read_only_folder_is_refused_in_one_line(stopped_run, reference, tmp_path, outcome):
    workdir = tmp_path / "run"
    shutil.copytree(stopped_run, workdir)
    script = f'mount --bind {workdir} {workdir} && mount -o remount,ro,bind {workdir} && exec "$@"'
    process = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, "bash", *command(workdir)],
        env=command_environment(),
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
def test_full_disk_fails_the_save_and_not_the_run(reference, tmp_path, outcome):
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
        env=command_environment(),
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


def test_two_runs_cannot_write_one_folder(tmp_path, outcome):
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
