"""Programs compiled for a GPU that is not there, and how their text is read."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from tiny import ROOT, command_environment

from maskdit_jax.benchmark.program import read_program

# A loop of three turns around a fusion that reads one slice of a stack; a product; a sum between devices.
TEXT = """HloModule m

%cut (p.0: f32[10,8], p.1: f32[8]) -> f32[8] {
  %p.0 = f32[10,8]{1,0} parameter(0)
  %p.1 = f32[8]{0} parameter(1)
  %slice.1 = f32[1,8]{1,0} slice(%p.0), slice={[0:1], [0:8]}
  %bitcast.1 = f32[8]{0} bitcast(%slice.1)
  ROOT %add.1 = f32[8]{0} add(%bitcast.1, %p.1)
}

%body (s: (f32[10,8], f32[8])) -> (f32[10,8], f32[8]) {
  %s = (f32[10,8]{1,0}, f32[8]{0}) parameter(0)
  %stack = f32[10,8]{1,0} get-tuple-element(%s), index=0
  %row = f32[8]{0} get-tuple-element(%s), index=1
  %fusion.1 = f32[8]{0} fusion(%stack, %row), kind=kLoop, calls=%cut
  ROOT %out = (f32[10,8]{1,0}, f32[8]{0}) tuple(%stack, %fusion.1)
}

ENTRY %main (a: (f32[10,8], f32[8]), b: bf16[4,8], c: bf16[8,2]) -> bf16[4,2] {
  %a = (f32[10,8]{1,0}, f32[8]{0}) parameter(0)
  %b = bf16[4,8]{1,0} parameter(1)
  %c = bf16[8,2]{1,0} parameter(2)
  %while.1 = (f32[10,8]{1,0}, f32[8]{0}) while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %gemm.1 = (bf16[4,2]{1,0}, s8[4096]{0}) custom-call(%b, %c), custom_call_target="__cublas$lt$matmul", backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]},"epilogue":"BIAS_GELU_AUX"}
  %product = bf16[4,2]{1,0} get-tuple-element(%gemm.1), index=0
  %sum = bf16[4,2]{1,0} all-reduce-start(%product), replica_groups={{0,1}}
  ROOT %all-reduce-done.1 = bf16[4,2]{1,0} all-reduce-done(%sum)
}
"""  # noqa: E501


def test_text_of_a_program_says_what_it_moves_and_computes():
    read = read_program(TEXT)
    assert read["kernels"] == {"elementwise": 3, "matmul": 1, "collective": 1}
    # A turn of the loop reads one row of the ten, and another row, and writes one.
    assert read["bytes"]["elementwise"] == 3 * (32 + 32 + 32)
    assert read["bytes"]["matmul"] == 2 * (4 * 8 + 8 * 2 + 4 * 2)  # without its scratch memory
    assert read["flops"] == 2 * 4 * 8 * 2
    assert read["collective_bytes"] == {"all-reduce": 16}
    assert (read["gelu_epilogues"], read["loops"], read["scatters"], read["rolled_copies"]) == (1, 1, 0, 0)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("jax_cuda13_plugin") is None, reason="JAX's wheels for CUDA are not here")
@pytest.mark.parametrize("devices", [1, 8])
def test_xl2s_blocks_compiled_for_an_h200_are_what_they_should_be(devices, tmp_path):
    """Of XL/2 two blocks and one of the decoder: fused attention and GELU, no scatter, no loop, no copy."""
    network = "size=custom hidden_size=1152 num_heads=16 patch_size=2 depth=2 decoder_depth=1".split()
    overrides = [f"--config.method.network.{option}" for option in network]
    flags = ["--config=configs/in256.py", f"--devices={devices}", "--batch=1024", f"--json={tmp_path / 'a'}"]
    done = subprocess.run(
        [sys.executable, "tools/compile_gpu.py", *flags, *overrides],
        cwd=ROOT,
        env=command_environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a").read_text())
    assert (result["gelu_epilogues"], result["attention_calls"]) == (3, 6)
    assert (result["scatters"], result["loops"], result["rolled_copies"]) == (0, 0, 0)
    assert result["donated_bytes"] > 0.97 * result["state_bytes"]  # all but the batch
    assert bool(result["collective_bytes"]) == (devices > 1)
