"""The same run on any mesh and any number of processes: laws of sharding."""

import functools
import json
import re
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import two_process_flags
from run_steps import BAD_STEP, run_steps
from tiny import BATCH_SIZE, RECIPES, ROOT, command_environment

from maskdit_jax.config import resolve
from maskdit_jax.config_file import load
from maskdit_jax.distributed.digest import digest
from maskdit_jax.distributed.mesh import bytes_of, describe_placement, make_mesh, state_shardings
from maskdit_jax.training.build import batch_shapes, build


@functools.cache
def on_one_device(recipe):
    return run_steps(1, 1, recipe)


def assert_same_run(metrics, arrays, recipe="digits") -> None:
    """Losses and gradient in every step, parameters and EMA to 1e-5 after all of them."""
    expected_metrics, expected_arrays = on_one_device(recipe)
    for step, (actual, expected) in enumerate(zip(metrics, expected_metrics, strict=True)):
        assert np.isnan(expected["loss"]) == (step == BAD_STEP)
        assert actual["nonfinite_total"] == (step >= BAD_STEP)
        for name in expected.keys() - {"grad_norm"}:
            np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, err_msg=f"{name} of {step}")
        np.testing.assert_allclose(actual["grad_norm"], expected["grad_norm"], rtol=1e-4)
    differences = [np.linalg.norm(a - e) for a, e in zip(arrays, expected_arrays, strict=True)]
    assert np.linalg.norm(differences) <= 1e-5 * np.linalg.norm([np.linalg.norm(e) for e in expected_arrays])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (8, 1), (1, 8)])
def test_twenty_steps_are_the_same_on_every_mesh(data, fsdp, recipe):
    assert_same_run(*run_steps(data, fsdp, recipe), recipe)


@pytest.mark.processes
def test_twenty_steps_are_the_same_in_two_processes(tmp_path):
    """Two processes with four devices each, which talk over loopback; one of them holds the NaN."""
    flags = ["--data=4", "--fsdp=2", f"--out={tmp_path / 'out'}", *two_process_flags()]
    command = [sys.executable, ROOT / "tests/run_steps.py", *flags]
    run = functools.partial(
        subprocess.Popen, env=command_environment(devices=4), stderr=subprocess.PIPE, text=True
    )
    processes = [run([*command, f"--process_id={i}"]) for i in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    with np.load(tmp_path / "out.npz") as arrays:
        assert_same_run(json.loads((tmp_path / "out.json").read_text()), list(arrays.values()))


def config_of(name: str, devices: int = 8, **options):
    overrides = [f"--config.{section.replace('__', '.')}={value}" for section, value in options.items()]
    return resolve(load(str(ROOT / f"configs/{name}.py"), overrides), device_count=devices)


def test_a_device_of_eight_holds_an_eighth_of_xl2s_state():
    """From shapes: parameters, EMA and both moments of XL/2."""
    training = build(config_of("in256", mesh__fsdp=8))
    state = training.state_shapes
    whole, each = bytes_of((state.params, state.ema["ema"], state.opt_state))
    assert whole > 4 * 4 * 700e6
    assert each <= 0.15 * whole
    text = describe_placement(state, training.mesh)
    share = float(re.search(r"MB \((\d+\.\d)%\) on each device", text)[1])
    assert share == pytest.approx(100 * each / whole, abs=0.1)
    assert "cut over fsdp=8" in text


def test_gradients_are_summed_between_devices_in_float32():
    """Every collective of the bfloat16 step, as lowered for two data and four fsdp devices, is float32."""
    network = {"size": "custom", "hidden_size": 128, "depth": 1, "num_heads": 2, "patch_size": 2}
    options = {f"method__network__{name}": value for name, value in network.items()}
    config = config_of("in256", mesh__fsdp=4, **options)
    training = build(config)
    assert config.compute.precision == "bfloat16"
    shapes = batch_shapes(config, training.mesh, BATCH_SIZE)
    text = training.step.lower(training.state_shapes, shapes, training.num_keep(0)).as_text()
    names = ("all_gather", "reduce_scatter", "all_reduce")
    types = {name: set() for name in names}
    for name, operand in re.findall(
        r'"stablehlo\.(\w+)"\(.*?\) (?:<\{|\(\{).*?: \(tensor<(?:\d+x)*(\w+)>', text, re.S
    ):
        if name in types:
            types[name].add(operand)
    assert types == {name: {"f32"} for name in names}


def defined_digest(tree: dict[str, np.ndarray]) -> str:
    """The digest by its definition, value by value; older checkpoints carry it."""
    halves = np.zeros(2, np.uint64)
    for name, x in tree.items():
        salt = zlib.crc32(f"['{name}'] {x.dtype} {x.shape}".encode())
        bits = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32)
        for half, turned in enumerate((salt, salt ^ 0x9E3779B9)):
            place = np.arange(bits.size, dtype=np.uint32) + np.uint32(turned)
            place = (place ^ (place >> 16)) * np.uint32(0x7FEB352D)
            place = (place ^ (place >> 15)) * np.uint32(0x846CA68B)
            numbers = (place ^ (place >> 16)) | np.uint32(1)
            halves[half] += np.uint64(salt) + (bits * numbers).sum(dtype=np.uint32)
    return "".join(f"{int(half) % 2**32:08x}" for half in halves)


def test_digest_is_its_definition_for_every_type_and_size(monkeypatch):
    """In blocks, which a small one shows, and by the program for arrays on devices."""
    monkeypatch.setattr("maskdit_jax.distributed.digest._BLOCK", 2048)
    random, mesh = np.random.default_rng(0), make_mesh(2, 4)
    tree = {
        "a": random.normal(size=(64, 512)).astype(np.float32),
        "b": random.integers(2**32, size=(3, 5, 7), dtype=np.uint32),
        "c": random.normal(size=(2049,)).astype(jnp.bfloat16),
        "d": np.arange(-4, 4, dtype=np.int8),
        "e": np.array(7, np.int32),
    }
    expected = defined_digest(tree)
    for placed in (tree, jax.device_put(tree), jax.device_put(tree, state_shardings(tree, mesh))):
        assert digest(placed) == expected
    assert digest({"a": tree["a"].T}) == defined_digest({"a": np.ascontiguousarray(tree["a"].T)})


def test_a_digest_leaves_an_array_free_to_be_donated():
    x = jnp.arange(2.0**12) + 1
    digest({"x": x})
    place = x.unsafe_buffer_pointer()
    assert jax.jit(lambda x: x + 1, donate_argnums=0)(x).unsafe_buffer_pointer() == place
    assert x.is_deleted()


def test_digest_is_the_same_on_any_mesh_and_changes_with_any_bit():
    random = np.random.default_rng(0)
    tree = {"a": random.normal(size=(64, 512)).astype(np.float32), "b": np.arange(7, dtype=np.int32)}
    reference = digest(tree)
    for data, fsdp in ((8, 1), (2, 4), (1, 8)):
        placed = jax.device_put(tree, state_shardings(tree, make_mesh(data, fsdp)))
        assert len(placed["a"].sharding.device_set) == 8
        assert digest(placed) == reference
    for _ in range(20):
        altered = {name: array.copy() for name, array in tree.items()}
        name = random.choice(["a", "b"])
        raw = altered[name].view(np.uint8).reshape(-1)
        raw[random.integers(len(raw))] ^= 1 << random.integers(8)
        assert digest(altered) != reference
    swapped = tree | {"a": tree["a"][::-1].copy()}
    assert digest(swapped) != reference
    assert digest({"a": tree["a"], "c": tree["b"]}) != reference
