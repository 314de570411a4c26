"""Processes of one run: how they come together, and what the others hear when one ends."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import two_process_flags

from maskdit_jax import main
from maskdit_jax.data.pipeline import batches
from maskdit_jax.distributed.hosts import Preemption
from maskdit_jax.errors import UserError

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
BODY = """
import argparse, time
import jax
from maskdit_jax.distributed.hosts import add_flags, everywhere, from_first, joined
parser = argparse.ArgumentParser()
add_flags(parser)
with joined(parser.parse_args()) as peers:
    index = jax.process_index()
"""


def in_two_processes(commands: list[list], *flags: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of two commands that flags make one run."""
    several = [*two_process_flags(), *flags]
    return run_all([([*command, *several, f"--process_id={i}"], {}) for i, command in enumerate(commands)])


def run_all(commands: list[tuple[list, dict[str, str]]]) -> list[tuple[int, str, str]]:
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=ENVIRONMENT | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, variables in commands
    ]
    ended = [process.communicate(timeout=60) for process in processes]
    return [(process.returncode, *said) for process, said in zip(processes, ended, strict=True)]


def run_body(body: str, *flags: str) -> list[tuple[int, str, str]]:
    return in_two_processes([["-c", BODY + body]] * 2, *flags)


@pytest.mark.processes
def test_processes_agree():
    """What process 0 says, everywhere; and whether something holds in all of them."""
    ended = run_body(
        """
    print(from_first({"text": "größer", "of": index}), everywhere(True), everywhere(index == 0))
"""
    )
    assert [code for code, _, _ in ended] == [0, 0], ended
    for _, said, _ in ended:
        assert "{'text': 'größer', 'of': 0} True False" in said


@pytest.mark.processes
def test_slurm_needs_no_flags():
    """Its variables, as srun sets them for two tasks on one node, are all that two processes need."""
    for port in range(61440, 65536):  # JAX derives the port from the number of the job
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            break
    variables = {
        "SLURM_JOB_ID": str(port - 61440),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
    }
    body = (
        BODY
        + """
    print("process", index, "of", jax.process_count())
"""
    )
    ranks = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    ended = run_all([(["-c", body], variables | rank) for rank in ranks])
    for i, (code, said, error) in enumerate(ended):
        assert code == 0, error
        assert f"process {i} of 2" in said


@pytest.mark.processes
def test_process_that_stays_behind_is_named():
    """Its main thread hangs, while the thread that says it lives goes on."""
    (code, _, error), _ = run_body(
        """
    peers.at(3)
    if index == 0:
        time.sleep(1.5)
        peers.at(5)
    time.sleep(20)
""",
        "--stall_timeout=3",
    )
    assert code == 76
    assert "error: process 1 (pid " in error
    assert "hangs: it has been at step 3 for 3 s, while process 0 waits at step 5" in error


@pytest.mark.processes
def test_error_in_one_process_ends_the_others_with_its_words(tmp_path):
    """Process 1 of a training command does not find the autoencoder: the other says so, and both end."""
    train = ["-m", "maskdit_jax.main", f"--config={ROOT / 'configs/digits.py'}"]
    started = time.monotonic()
    ended = in_two_processes(
        [
            [*train, f"--workdir={tmp_path / 'run'}"],
            [*train, f"--workdir={tmp_path / 'run'}", f"--config.vae={tmp_path / 'nothing'}"],
        ]
    )
    assert [code for code, _, _ in ended] == [76, 2], ended
    line = ended[1][2].splitlines()[-1]
    assert line.startswith("error: ")
    assert str(tmp_path / "nothing") in line
    assert f"stopped: {line.removeprefix('error: ')}" in ended[0][2]
    assert time.monotonic() - started < 50


def test_crash_of_a_reading_thread_is_reported_with_its_cause():
    class Breaking:
        def __len__(self):
            return 100

        def read(self, items, draws):
            if draws[0] >= 40:
                raise RuntimeError("the disk has gone")
            return {"labels": items}

    loader = batches(Breaking(), batch_size=10, seed=0, num_threads=2)
    assert len([next(loader) for _ in range(4)]) == 4
    with pytest.raises(UserError, match=r"from item 40 of .*RuntimeError: the disk has gone"):
        next(loader)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--coordinator=host:1"], "--num_processes, --process_id must be given too"),
        (
            ["--coordinator=host", "--num_processes=2", "--process_id=1"],
            "--coordinator=host: expected HOST:P",
        ),
        (["--coordinator=host:1", "--num_processes=2", "--process_id=2"], "--process_id=2: expected 0 … 1"),
        (
            ["--coordinator=localhost:1", "--num_processes=2", "--process_id=1", "--connect_timeout=1"],
            "nobody answers at --coordinator=localhost:1 after 1 s",
        ),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags, expected, capsys, tmp_path):
    config = f"--config={ROOT / 'configs/digits.py'}"
    with pytest.raises(SystemExit) as stopped:
        main.main([config, f"--workdir={tmp_path}", *flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert expected in error
    assert len(error.splitlines()) == 1


def test_port_that_is_taken_is_refused(capsys, tmp_path):
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        flags = [f"--coordinator={address}", "--num_processes=2", "--process_id=0"]
        with pytest.raises(SystemExit) as stopped:
            main.main([f"--config={ROOT / 'configs/digits.py'}", f"--workdir={tmp_path}", *flags])
    assert stopped.value.code == 2
    assert "of this host: Address already in use; choose another" in capsys.readouterr().err


def test_the_first_ctrl_c_asks_and_the_second_ends():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
        signal.raise_signal(signal.SIGINT)
        assert preemption.asked(1)
        assert preemption.by == "Ctrl-C"
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
