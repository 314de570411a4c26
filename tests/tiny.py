"""The one tiny configuration of the tests, and how they read the runs that it makes."""

import functools
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from maskdit_jax.config import ConfigDict, resolve
from maskdit_jax.config_file import load
from maskdit_jax.training.build import build
from maskdit_jax.training.checkpoint import open_run
from maskdit_jax.training.state import TrainState

ROOT = Path(__file__).parent.parent
NUM_STEPS, BATCH_SIZE, SAVE_EVERY = 8, 16, 2
PEAK_RATE, WARMUP_STEPS, EMA_DECAY = 1e-3, 4, 0.9
# Wide enough that fsdp cuts arrays; two blocks, so that their order counts; rolled, to compile fast.
NETWORK = {
    "hidden_size": 64,
    "depth": 2,
    "num_heads": 4,
    "decoder_hidden_size": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
# What makes each method tiny; and the recipes that stand for it where a test is for all methods.
OF_METHOD = {
    "maskdit": {f"method.network.{name}": value for name, value in NETWORK.items()}
    | {"sampling.solver": "euler"},
    "maskdm": {"method.network.hidden_size": 64, "method.network.depth": 3, "method.network.num_heads": 4},
    "dit": {"method.network.hidden_size": 64, "method.network.depth": 2, "method.network.num_heads": 4},
    "mdt": {"method.network.hidden_size": 64, "method.network.depth": 4, "method.network.num_heads": 4},
}
RECIPES = ("digits", "digits_maskdm_pretrain")
TINY = {
    "compute.unroll": "none",
    "training.num_steps": NUM_STEPS,
    "training.batch_size": BATCH_SIZE,
    "ema.decay": EMA_DECAY,
    "optimizer.learning_rate": PEAK_RATE,
    "optimizer.warmup_kimg": WARMUP_STEPS * BATCH_SIZE / 1000,
    "checkpoint.every_steps": SAVE_EVERY,
    "report.every_steps": 1,
    "report.tensorboard": "false",
    "report.preview_steps": 0,
    "report.preview_columns": 2,
    "sampling.num_steps": 2,
    "evaluation.num_samples": 0,
}
# What the finished run of conftest.py has besides.
REPORTED = {
    "report.tensorboard": "true",
    "report.preview_steps": 4,
    "evaluation.num_samples": 40,
    "evaluation.every_steps": 4,
    "evaluation.during_samples": 40,
    "evaluation.keep_best": "true",
}


def tiny_flags(options: dict | None = None, config: str = "digits") -> list[str]:
    """Flags of a command that name a recipe and make it tiny, but for `options`."""
    file = ROOT / "configs" / f"{config}.py"
    tiny = TINY | OF_METHOD[load(str(file)).method.name] | (options or {})
    return [f"--config={file}", *(f"--config.{name}={value}" for name, value in tiny.items())]


def tiny_config(
    options: dict | None = None, devices: int | None = None, config: str = "digits"
) -> ConfigDict:
    """A tiny recipe, by default that of the digits, resolved; by default for all devices."""
    file, *overrides = tiny_flags(options, config)
    return resolve(load(file.partition("=")[2], overrides), device_count=devices or jax.device_count())


def command_environment(devices: int = 1) -> dict[str, str]:
    """Of a command of the package on so many virtual devices; it shares the tests' compiled programs."""
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    here = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return inherited | here


def call_tool(monkeypatch, name: str, *flags: str) -> None:
    """A command of tools/, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")


def refusal(capsys, entry: Callable, *arguments) -> str:
    """The line on stderr with which a command, called here, refuses what it is asked."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        entry(*arguments)
    stderr = capsys.readouterr().err
    assert stopped.value.code == 2, stderr
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert len(stderr.splitlines()) == 1, stderr
    return stderr


def all_files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """When every file of a folder was written, and what is in it."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def steps_of(workdir: Path) -> list[int]:
    """The checkpoints on disk, the newest last."""
    return sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdecimal())


def restored(workdir: Path, step: int | None = None, devices: int = 1) -> tuple[TrainState, dict]:
    """State and metadata of a checkpoint, by default the newest, whatever mesh wrote it."""
    checkpoints = open_run(workdir)
    step = step or checkpoints.steps[-1]
    meta = checkpoints.meta(step)
    state = checkpoints.restore(step, meta, _state_shapes(json.dumps(meta["config"]), devices))
    checkpoints.close()
    return state, meta


@functools.cache
def _state_shapes(config: str, devices: int) -> TrainState:
    resolved = ConfigDict(json.loads(config))
    resolved.mesh.data, resolved.mesh.fsdp = devices, 1
    return build(resolved).state_shapes


def arrays_of(workdir: Path, step: int | None = None) -> list[np.ndarray]:
    """Every array of a checkpoint, by default the newest, and the position in the data."""
    state, meta = restored(workdir, step)
    return [np.asarray(x) for x in (*jax.tree.leaves(state), meta["items_consumed"])]


def difference(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Distance of one list of arrays from another, relative; 0.0: the same bits."""
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    if all(np.array_equal(a, b) for a, b in zip(actual, expected, strict=True)):
        return 0.0
    distances = [np.linalg.norm(np.float64(a) - b) for a, b in zip(actual, expected, strict=True)]
    norm = np.linalg.norm([np.linalg.norm(b) for b in expected])
    return max(float(np.linalg.norm(distances) / norm), 1e-300)


def largest_file(item: Path) -> Path:
    return max((p for p in item.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_one_byte(item: Path) -> None:
    """In the middle of the file that holds the values."""
    file = largest_file(item / "d")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
