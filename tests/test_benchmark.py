"""tools/benchmark.py as a user runs it, where nothing but JAX, Flax, Optax and Orbax is installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from maskdit_jax.data.benchmark import write_synthetic_shards

ROOT = Path(__file__).parents[1]
ABSENT = """
    tensorflow tensorflow_datasets clu ml_collections grain sklearn PIL torch safetensors lmdb diffusers
""".split()
TINY = [
    "--config=configs/digits.py",
    "--config.model.depth=1",
    "--config.model.hidden_size=16",
    "--config.model.num_heads=2",
    "--config.model.decoder_depth=1",
    "--config.model.decoder_hidden_size=16",
    "--config.model.decoder_num_heads=2",
    "--batch=8",
]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Run Python from the root of the repository, without the packages of ABSENT."""
    bare = tmp_path_factory.mktemp("bare")
    (bare / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    environment = os.environ | {
        "PYTHONPATH": f"{bare}{os.pathsep}{ROOT}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

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


@pytest.mark.parametrize("name", ABSENT)
def test_packages_are_absent(python, name):
    """Otherwise the other tests of this file would say nothing."""
    assert "ModuleNotFoundError" in python("-c", f"import {name}").stderr


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
    assert result["overrides"] == [option for option in TINY if option.startswith("--config.")]


def test_compile_only_runs_nothing(python, tmp_path):
    *_, summary = benchmark(python, "--compile_only", f"--json={tmp_path / 'result.json'}")
    result = json.loads((tmp_path / "result.json").read_text())
    assert re.fullmatch(r"compiled in \d+\.\d s", summary)
    assert result["compile_s"] > 0
    assert result["batch_size"] == 8
    assert "images_per_s" not in result


def test_a_bad_option_is_one_line_and_exit_code_2(python):
    done = python("tools/benchmark.py", *TINY, "--config.model.hiden_size=32")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "model.hiden_size" in line and "model.hidden_size" in line


def test_loader_is_measured_beside_a_bare_read(tmp_path):
    """On shards given: both speeds, their ratio, memory."""
    write_synthetic_shards(tmp_path, 300, shard_size=100)
    flags = [f"--data={tmp_path}", "--batch=32", "--threads=1", "--rounds=3", "--batches=10"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tools/benchmark_loader.py"), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["items"] == 600
    assert result["loader_items_per_s"] > 1000
    assert result["ratio"] == pytest.approx(result["loader_items_per_s"] / result["bare_items_per_s"])
    assert len(result["anonymous_memory_mb"]) == 2
