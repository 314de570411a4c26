"""tools/benchmark.py as a user runs it, where nothing but JAX, Flax, Optax and Orbax is installed."""

import functools
import json
import os
import re
import subprocess
import sys

import pytest
from tiny import NETWORK, ROOT, call_tool, command_environment, refusal

from maskdit_jax.data.loader_speed import write_synthetic_shards

ABSENT = """
    tensorflow tensorflow_datasets clu ml_collections grain sklearn PIL torch safetensors lmdb diffusers
""".split()
OPTIONS = [f"--config.method.network.{name}={value}" for name, value in NETWORK.items()]
TINY = ["--config=configs/digits.py", *OPTIONS, "--batch=8"]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Run Python from the root of the repository, without the packages of ABSENT."""
    bare = tmp_path_factory.mktemp("bare")
    (bare / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    environment = command_environment() | {"PYTHONPATH": f"{bare}{os.pathsep}{ROOT}"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def benchmark(python, *arguments: str) -> list[str]:
    """Lines that the benchmark of the tiny model prints."""
    done = python("tools/benchmark.py", *TINY, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.processes
def test_packages_are_absent(python):
    """Otherwise the other tests of this file would say nothing."""
    script = f"""
for name in {ABSENT}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        print(name)
"""
    assert python("-c", script).stdout.split() == ABSENT


@pytest.mark.processes
def test_times_steps_and_writes_what_it_prints(python, tmp_path):
    *printed, summary = benchmark(python, "--blocks=2", "--steps=2", f"--json={tmp_path / 'result.json'}")
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads("\n".join(printed)) == result
    speed = re.fullmatch(r"([\d,]+\.\d) images/s, \d+\.\d ms a step", summary).group(1)
    assert float(speed.replace(",", "")) == pytest.approx(result["images_per_s"], rel=0.01)

    fastest, slowest = result["step_s_min_max"]
    assert 0 < fastest <= result["step_s"] <= slowest
    assert result["images_per_s"] == pytest.approx(8 / result["step_s"])
    assert result["batch_size"] == 8
    assert result["visible_patches"] == 8  # half of 4 × 4
    # Parameters, EMA and both moments of Adam, in float32.
    assert result["program_bytes"] > 4 * 4 * result["parameters"]
    assert result["overrides"] == OPTIONS


@pytest.mark.processes
def test_compile_only_runs_nothing(python, tmp_path):
    *_, summary = benchmark(python, "--compile_only", f"--json={tmp_path / 'result.json'}")
    result = json.loads((tmp_path / "result.json").read_text())
    assert re.fullmatch(r"compiled in \d+\.\d s", summary)
    assert result["compile_s"] > 0
    assert result["batch_size"] == 8
    assert "images_per_s" not in result


@pytest.mark.processes
def test_takes_turns_with_torch(monkeypatch, tmp_path, capsys):
    """Each side in a process of its own; ratios are of rounds, ours to torch's."""
    file = tmp_path / "result.json"
    flags = ["--torch=eager", "--blocks=2", "--steps=2", f"--json={file}", "--config.compute.unroll=none"]
    call_tool(monkeypatch, "benchmark", *TINY, *flags)
    result, printed = json.loads(file.read_text()), capsys.readouterr().out
    ours, *others = result["sides"]
    assert ours == "maskdit_jax" and others == list(result["ratios"])
    assert others[0] == "torch eager"
    parameters = {about["parameters"] for about in result["about"].values()}
    assert len(parameters) == 1  # the same network
    for name, took in result["sides"].items():
        assert took["wall_s"][1] <= took["wall_s"][0] <= took["wall_s"][2]
        assert took["images_per_s"] == pytest.approx(8 / took["wall_s"][0])
        assert took["peak_bytes"] > 50e6 and f"\n{name} " in printed
    low, high = (result["ratios"]["torch eager"]["wall_s"][i] for i in (1, 2))
    assert low <= result["ratios"]["torch eager"]["wall_s"][0] <= high


@pytest.mark.processes
def test_a_side_that_fails_says_why_in_one_line(monkeypatch, capsys):
    flags = ["--config=configs/digits_maskdm_pretrain.py", "--torch", "--batch=8"]
    line = refusal(capsys, functools.partial(call_tool, monkeypatch, "benchmark"), *flags)
    assert line.startswith("error: maskdit_jax: the torch model is MaskDiT's: method.name=maskdm")


@pytest.mark.processes
def test_a_bad_option_is_one_line_and_exit_code_2(python):
    done = python("tools/benchmark.py", *TINY, "--config.method.network.hiden_size=32")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "method.network.hiden_size" in line and "method.network.hidden_size" in line


def test_loader_is_measured_beside_a_bare_read(tmp_path, monkeypatch, capsys):
    """On shards given: both speeds, their ratio, memory."""
    write_synthetic_shards(tmp_path, 300, shard_size=100)
    flags = [f"--data={tmp_path}", "--batch=32", "--threads=1", "--rounds=3", "--batches=10"]
    call_tool(monkeypatch, "benchmark_loader", *flags)
    result = json.loads(capsys.readouterr().out)
    assert result["items"] == 600
    assert result["loader_items_per_s"] > 1000
    assert result["ratio"] == pytest.approx(result["loader_items_per_s"] / result["bare_items_per_s"])
    assert len(result["anonymous_memory_mb"]) == 2
