"""tools/doctor.py as a user runs it: alone, in two processes, and with something wrong in one of them."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import free_port, two_process_flags

from maskdit_jax.doctor import CHECKS, room_for_checkpoints
from maskdit_jax.errors import UserError

ROOT = Path(__file__).parent.parent
COMMAND = str(ROOT / "tools" / "doctor.py")
DIGITS = f"--config={ROOT / 'configs' / 'digits.py'}"
TINY_IN256 = [
    f"--config={ROOT / 'configs' / 'in256.py'}",
    "--config.method.network.size=S/2",
    "--config.method.network.depth=1",
    "--config.method.network.decoder_depth=1",
]
LIMIT_S = 60


def start(flags: list[str], platform: str = "cpu", before: str = "") -> subprocess.Popen:
    """The command in a process of its own, on one device, after the Python code `before`."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    code = f"{before}\nimport runpy\nrunpy.run_path({COMMAND!r}, run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, *(["-c", code] if before else [COMMAND]), *flags],
        env=inherited | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": platform},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    try:
        printed, complained = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert "Traceback" not in printed + complained
    return process.returncode, printed, complained


@pytest.fixture
def diagnose(monkeypatch, capsys):
    """The command in this process; exit code, standard output and standard error."""

    def diagnose(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [COMMAND, *flags])
        code = 0
        try:
            runpy.run_path(COMMAND, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return diagnose


def results(printed: str) -> dict[str, tuple[str, str]]:
    """Of each check, `ok` or `FAILED`, and what was said."""
    lines = re.findall(r"^(ok      |FAILED  )(\w+)(?: of process \d+)?: (.+)$", printed, re.MULTILINE)
    return {name: (status.strip(), said) for status, name, said in lines}


def test_all_checks_of_a_run_pass_and_leave_nothing_behind(diagnose, tmp_path):
    code, printed, complained = diagnose(DIGITS, f"--workdir={tmp_path / 'runs' / 'new'}")
    assert code == 0, printed + complained
    found = results(printed)
    assert list(found) == [name for name in CHECKS if name != "agreement"]
    assert {status for status, _ in found.values()} == {"ok"}
    assert "jaxlib " in found["packages"][1]
    assert "backend cpu" in found["devices"][1]
    assert "1,437 items; clean [128, 8, 8, 1] float32" in found["data"][1]
    assert f"{tmp_path} can be written to" in found["folder"][1]
    assert "4 checkpoints of 0.014 GB will fit" in found["folder"][1]
    assert printed.endswith(f"all {len(found)} checks passed\n")
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_not_there_fails_and_the_checks_after_it_are_made(diagnose, tmp_path):
    flags = [*TINY_IN256, "--config.data.source=latents:/nonexistent", f"--workdir={tmp_path}"]
    code, printed, _ = diagnose(*flags)
    assert code == 1
    found = results(printed)
    assert [name for name, (status, _) in found.items() if status == "FAILED"] == ["data"]
    assert "no latents in '/nonexistent'" in found["data"][1]
    assert "tools/encode_latents.py" in found["data"][1]
    assert "will fit" in found["folder"][1]
    assert printed.endswith(f"1 of {len(found)} checks failed: data\n")


def test_wrong_configuration_and_folder_fail_with_their_remedies(diagnose, tmp_path):
    (tmp_path / "file").touch()
    code, printed, _ = diagnose(DIGITS, "--config.mesh.fsdp=3", f"--workdir={tmp_path / 'file' / 'run'}")
    assert code == 1
    found = results(printed)
    assert "mesh.fsdp=3 is not the number of devices" in found["configuration"][1]
    assert "choose another --workdir" in found["folder"][1]
    assert "data" not in found
    assert printed.endswith(f"2 of {len(found)} checks failed: configuration, folder\n")


def test_coordinator_that_does_not_answer_is_named_in_time(diagnose):
    port, started = free_port(), time.monotonic()
    flags = [f"--coordinator=localhost:{port}", "--num_processes=2", "--process_id=1", "--connect_timeout=1"]
    code, _, error = diagnose(*flags)
    assert time.monotonic() - started < 5
    assert code == 2
    assert error.startswith(f"error: nobody answers at --coordinator=localhost:{port} after 1 s")
    assert "start process 0 there" in error


def two_processes(flags: list[list[str]]) -> list[tuple[int, str, str]]:
    """The command as two processes of one run, with their own flags."""
    together = two_process_flags()
    return [end(process) for process in [start([*together, f"--process_id={i}", *flags[i]]) for i in (0, 1)]]


@pytest.mark.processes
def test_two_processes_pass_and_only_the_first_reports(tmp_path):
    (code, printed, complained), second = two_processes([[DIGITS, f"--workdir={tmp_path}"]] * 2)
    assert code == 0, printed + complained
    assert second[0] == 0
    assert not results(second[1])
    found = results(printed)
    assert list(found) == list(CHECKS)
    assert "2, all here" in found["processes"][1]
    assert "a sum over 2 devices" in found["collectives"][1]
    assert "[64, 8, 8, 1]" in found["data"][1]
    assert printed.endswith(f"all {len(CHECKS)} checks passed\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_collective_that_another_process_does_not_join_ends_in_time():
    slow = (
        "import time\nfrom maskdit_jax import doctor\ndoctor._Checks.arithmetic = lambda self: time.sleep(60)"
    )
    together = [*two_process_flags(), "--connect_timeout=6"]
    first = start([*together, "--process_id=0"])
    second = start([*together, "--process_id=1"], before=slow)
    try:
        code, printed, _ = end(first)
    finally:
        second.kill()
        second.communicate()
    assert code == 1
    status, said = results(printed)["collectives"]
    assert status == "FAILED"
    assert "in 6 s" in said
    assert "firewall" in said
    assert "NCCL_SOCKET_IFNAME" in said


@pytest.mark.processes
@pytest.mark.parametrize("platform", ["abacus", "cuda"])
def test_device_that_does_not_start_is_one_line_with_the_remedy(platform):
    if platform == "cuda" and importlib.util.find_spec("jax_plugins"):
        pytest.skip("its plugin is installed")
    code, _, error = end(start([], platform=platform))
    assert code == 2
    assert error.startswith(f"error: JAX finds no devices with JAX_PLATFORMS={platform}: ")
    assert "pip install '.[cuda12]'" in error
    assert len(error.splitlines()) == 1


@pytest.mark.processes
@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ("--workdir={}/b", '--workdir is "{0}/b" in process 1, but "{0}/a" in process 0'),
        ("--config.seed=1", "--config.seed is 1 in process 1, but 0 in process 0"),
    ],
)
def test_processes_that_differ_fail_in_both(flags, difference, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    common = [DIGITS, f"--workdir={tmp_path / 'a'}"]
    ended = two_processes([common, [*common, flags.format(tmp_path)]])
    for code, printed, _ in ended:
        assert code == 1
        assert difference.format(tmp_path) in results(printed)["agreement"][1]
    assert f"1 of {len(CHECKS)} checks failed: agreement" in ended[0][1]


@pytest.mark.processes
def test_what_one_process_does_not_find_is_not_compared(tmp_path):
    (code, first, _), (_, second, _) = two_processes([[DIGITS], [DIGITS, "--config.mesh.fsdp=3"]])
    assert code == 1
    assert "mesh.fsdp=3" in results(second)["configuration"][1]
    assert results(first)["agreement"] == ("ok", "the same software in all processes")
    assert "1 of 8 checks failed: configuration" in first


def test_checkpoints_that_do_not_fit_are_refused_but_those_on_disk_do_not_count():
    size = 10**9
    assert "4 checkpoints of" in room_for_checkpoints(4 * size, size, keep=3, saved=0)
    assert "1 checkpoint of" in room_for_checkpoints(size, size, keep=3, saved=3)
    with pytest.raises(UserError, match=r"4 checkpoints of 1\.000 GB .* lower checkpoint\.keep=3"):
        room_for_checkpoints(4 * size - 1, size, keep=3, saved=0)
