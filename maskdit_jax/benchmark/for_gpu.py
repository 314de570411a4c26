"""A step or a sampler compiled for a GPU that is not there: memory, traffic and kernels, not times."""

import os
import time
from typing import Any

import jax
from jax.experimental import topologies

from maskdit_jax.benchmark.program import read_program
from maskdit_jax.config import ConfigDict
from maskdit_jax.data.codec import Codec
from maskdit_jax.distributed.mesh import whole_sharding
from maskdit_jax.errors import UserError, first_line
from maskdit_jax.sampling import Model
from maskdit_jax.training.build import batch_shapes, build

WHEELS = "jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc, nvidia-nvvm and nvidia-cudnn-cu13"
# What XLA asks of a device that it compiles for, and measured ceilings: bytes/s of a copy, bfloat16 FLOP/s.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
runtime_version: { major: 13 } platform_name: "CUDA" dnn_version_info { major: 9 minor: 15 }
device_description_str: "NVIDIA H200"
"""
GPUS = {"h200": (H200, 4.3e12, 790e12)}
# Without a device there is nothing to tune kernels on.
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}


def prepare() -> None:
    """Before JAX's first use: its plugin for CUDA shall load where there is no GPU."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"


def topology_devices(gpu: str, count: int) -> list[jax.Device]:
    """So many devices of that kind, to compile for.

    Raises:
      UserError: the GPU is not known, or the wheels are not there.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu={gpu} is unknown; known: {', '.join(GPUS)}")
    try:
        topology = topologies.get_topology_desc(
            gpu, "cuda", target_config=GPUS[gpu][0], topology=f"1x1x{count}"
        )
    except Exception as error:  # whatever the plugin raises
        raise UserError(
            f"cannot compile for a GPU ({first_line(error, 100)}); install {WHEELS}, the first two in jax's "
            f"own version, {jax.__version__}"
        ) from error
    return list(topology.devices)


def compile_for(
    config: ConfigDict, gpu: str, devices: list[jax.Device], *, sampling: bool = False
) -> tuple[dict[str, Any], str]:
    """The step of a resolved configuration, compiled for those devices: what it does, and its text.

    With `sampling` it is the sampler of the section `sampling`, for as many images as the step has.

    Bytes and FLOPs are of one device. The configuration says compute.attention and compute.unroll, whose
    "auto" asks for the GPU that is there. predicted_s: the longer of memory traffic and matrix products at
    the measured ceilings, and their sum, between which a step should lie that does nothing else.
    """
    batch, started = config.training.batch_size, time.monotonic()
    lowered = _lowered_sampler(config, devices) if sampling else _lowered_step(config, devices)
    compiled = lowered.compile(compiler_options=dict(COMPILER_OPTIONS))
    seconds, text = time.monotonic() - started, str(compiled.as_text())
    memory: Any = compiled.memory_analysis()
    program = read_program(text)
    per_device = batch / len(devices)
    _, copy_rate, flop_rate = GPUS[gpu]
    times = sum(program["bytes"].values()) / copy_rate, program["flops"] / flop_rate
    return {
        "gpu": gpu,
        "devices": len(devices),
        "batch_size": batch,
        "compile_s": seconds,
        "state_bytes": memory.argument_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "temporary_mb_per_image": memory.temp_size_in_bytes / 1e6 / per_device,
        "traffic_gb_per_image": sum(program["bytes"].values()) / 1e9 / per_device,
        "gflop_per_image": program["flops"] / 1e9 / per_device,
        "predicted_s": [max(times), sum(times)],
        **program,
    }, text


def _lowered_step(config: ConfigDict, devices: list[jax.Device]) -> jax.stages.Lowered:
    training = build(config, devices)
    shapes = batch_shapes(config, training.mesh, config.training.batch_size)
    return training.step.lower(training.state_shapes, shapes, training.num_keep(0))


def _lowered_sampler(config: ConfigDict, devices: list[jax.Device]) -> jax.stages.Lowered:
    training = build(config, devices)
    whole = whole_sharding(training.mesh)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), training.state_shapes.params
    )
    model = Model(config, params, training.mesh, Codec(config.data.space, config.data.latent_scale))
    return model.lower(batch_size=config.training.batch_size // len(devices))
