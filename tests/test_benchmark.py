"""tools/benchmark.py as a user runs it, where nothing but JAX, Flax, Optax and Orbax is installed."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
from tiny import NETWORK, ROOT, call_tool, command_environment, refusal

from maskdit_jax.benchmark import parity
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
    told = r"([\d,]+\.\d) images/s, \d+\.\d ms a step, \d+\.\d% of a matrix product's FLOP/s"
    speed = re.fullmatch(told, summary).group(1)
    assert float(speed.replace(",", "")) == pytest.approx(result["images_per_s"], rel=0.01)

    fastest, slowest = result["step_s_min_max"]
    assert 0 < fastest <= result["step_s"] <= slowest
    assert result["images_per_s"] == pytest.approx(8 / result["step_s"])
    assert result["batch_size"] == 8
    assert result["visible_patches"] == 8  # half of 4 × 4
    # Parameters, EMA and both moments of Adam, in float32.
    assert result["program_bytes"] > 4 * 4 * result["parameters"]
    assert result["utilisation"] == pytest.approx(result["flops_per_s"] / result["matmul_flops_per_s"])
    assert result["peak_bytes_of_process"] > result["program_bytes"]
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
def test_sides_of_one_process_are_compared_with_the_first(monkeypatch, tmp_path, capsys):
    file = tmp_path / "result.json"
    sides = ["compute.remat=none", "digits compute.remat=full training.batch_size=16"]
    flags = [*TINY[:-1], *(f"--compare={side}" for side in sides), "--config.compute.unroll=none", "--peak"]
    call_tool(monkeypatch, "benchmark", *flags, "--blocks=3", "--steps=2", f"--json={file}")
    result, printed = json.loads(file.read_text()), capsys.readouterr().out
    first, second = (result["sides"][side] for side in sides)
    assert (first["batch_size"], second["batch_size"]) == (128, 16)
    assert list(result["ratios"]) == sides[1:]
    ratios = result["ratios"][sides[1]]
    # Of an image, and without what is computed again.
    assert ratios["flops_per_image"] == 1
    assert ratios["program_bytes"] < 1
    assert ratios["wall_s"][1] <= ratios["wall_s"][0] <= ratios["wall_s"][2]
    assert first["images_per_s"] == pytest.approx(1 / first["wall_s"][0])
    assert ratios["peak_bytes"] == pytest.approx(second["peak_bytes"] / first["peak_bytes"])
    assert re.search(rf"\n{sides[1]} .* time \d.*FLOPs 1.00, program 0\.\d\d, peak", printed)


@pytest.mark.slow
def test_the_loop_takes_turns_with_the_bare_step(monkeypatch, tmp_path, capsys):
    """A real run with its data, of which nothing is left; its compilation is in no block."""
    file = tmp_path / "result.json"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    flags = ["--loop", "--blocks=3", "--steps=4", f"--json={file}", "--config.compute.unroll=none"]
    call_tool(monkeypatch, "benchmark", *TINY, *flags)
    result, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert "step 16/16" in printed and list(tmp_path.iterdir()) == [file]
    low, high = (
        result["step"]["wall_s"][i] / result["loop"]["wall_s"][3 - i] for i in (1, 2)
    )  # of any two blocks
    assert low <= result["ratios"]["wall_s"][1] <= result["ratios"]["wall_s"][2] <= high
    assert result["loop"]["wall_s"][2] < 2
    assert f"the loop runs at {result['ratios']['wall_s'][0]:.3f} " in printed


@pytest.mark.processes
def test_sampling_counts_what_guidance_costs(monkeypatch, tmp_path, capsys):
    """Of four Euler steps from sigma 80 to 0.002 the interval guides the one at 9.7."""
    file = tmp_path / "result.json"
    options = ["--sampling", "--guidance_interval=5,20", "--config.sampling.num_steps=4", "--blocks=1"]
    options += ["--config.sampling.solver=euler", "--config.sampling.cfg_scale=2"]
    call_tool(monkeypatch, "benchmark", *TINY, *options, f"--json={file}")
    result = json.loads(file.read_text())
    assert result["network_evaluations"] == 5
    assert result["images_per_s"] == pytest.approx(8 / result["batch_s"])
    assert result["utilisation"] == pytest.approx(
        result["images_per_s"] * result["flops_per_image"] / result["matmul_flops_per_s"] / jax.device_count()
    )
    assert "images/s, 5 network evaluations each\n" in capsys.readouterr().out


@pytest.mark.processes
def test_suite_goes_on_and_says_what_cannot_be(python, tmp_path):
    """Without torch its piece is recorded as failed; a second call runs what is left."""
    file = tmp_path / "gpu.json"
    suite = ["tools/benchmark.py", f"--suite={file}", "--small"]
    done = python(*suite, "--pieces=ceiling,torch")
    assert done.returncode == 0, done.stderr
    pieces = json.loads(file.read_text())["pieces"]
    assert pieces["ceiling"]["device"]["matmul_flops_per_s"].keys() == {"bfloat16", "tf32", "float32"}
    (torch_case,) = pieces["torch"].values()
    assert torch_case["failed"] == "torch is not installed: pip install '.[torch]'"

    done = python(*suite, "--pieces=ceiling,remat", "--limit_s=1")
    assert done.stdout.splitlines()[0].startswith("remat: mlp, batch 8: done"), done.stdout
    assert done.stdout.splitlines()[1] == "1 s are over: 1 cases left, the same command goes on"
    assert json.loads(file.read_text())["pieces"]["ceiling"] == pieces["ceiling"]
    table = file.with_suffix(".md").read_text()
    assert "**remat**" in table and "| mlp, batch 8 |" in table and "torch is not installed" in table
    assert python("tools/benchmark.py", f"--suite={file}").stderr.endswith(
        "is of another size: name another file\n"
    )


@pytest.mark.slow
def test_parity_finds_a_network_near_itself_in_bfloat16_and_another_one_far(tmp_path):
    folders = {name: tmp_path / name for name in ("float32", "bfloat16", "other")}
    for name, folder in folders.items():
        folder.mkdir()
        side = parity.sides("float32" if name == "other" else name, small=True)["MaskDiT"]
        if name == "other":
            side.overrides.append("--config.seed=1")
        np.savez(folder / "MaskDiT.npz", **parity.outputs(side.resolved())[0])

    def distance(name):
        return parity.distances(folders[name], folders["float32"], "bfloat16", ["MaskDiT"])["MaskDiT"]

    assert distance("bfloat16")["within"] and distance("bfloat16")["outputs"] > 1e-4
    assert not distance("other")["within"]


WRONG = {
    "": "give --config=FILE, --compare or --suite=JSON",
    "--config=digits --steps=0": "--steps=0 must be at least 1",
    "--config=digits --batch=0": "--batch=0 must be at least 1",
    "--config=digits --torch=lazy": "--torch=lazy: expected eager, compiled or both",
    "--config=digits --torch --compile_only": "--torch and --compile_only do not go together",
    "--config=digits --loop --torch": "--torch and --loop do not go together",
    "--config=digits --peak": "--peak is for --compare",
    "--config=digits --guidance_interval=1,2": "--guidance_interval is for --sampling",
    "--config=digits --guidance_interval=1": "invalid interval value: '1'",
    "--config=digits --sampling --torch": "--sampling does not go with --torch",
    "--config=digits --compare=ema.decay=0.9": "is given 1 sides: expected two or more",
    "--compare=digits --compare=ema.decay=0.9": "names 0 configurations",
    "--config=digits --compare=ema.decay=0.9 --compare=ema.decai=0.9": "ema.decai",
    "--config=digits --json=nowhere/x.json": "there is no folder nowhere",
    "--suite=x.json --pieces=parity,stepp": "'stepp' is unknown; known: ",
    "--suite=x.json --config.seed=1": "the suite has configurations of its own",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_are_one_line(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = refusal(capsys, functools.partial(call_tool, monkeypatch, "benchmark"), *flags.split())
    assert WRONG[flags] in line
    assert not list(tmp_path.iterdir())


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
