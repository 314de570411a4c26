"""How fast a configuration trains, on synthetic data that stay on the device: no files, no TensorFlow."""

import statistics
import time
from typing import Any

import jax

from maskdit_jax.config import ConfigDict, method_of
from maskdit_jax.distributed.mesh import check_fits
from maskdit_jax.training.build import Training, batch_shapes, build

WARM_UP_STEPS = 3


def compile_step(config: ConfigDict, training: Training) -> tuple[Any, float]:
    """The step that `build` made of `config`, compiled from shapes for its first mask ratio; seconds."""
    shapes = batch_shapes(config, training.mesh, config.training.batch_size)
    started = time.monotonic()
    lowered = training.step.lower(training.state_shapes, shapes, training.num_keep(0))
    return lowered.compile(), time.monotonic() - started


def describe_program(compiled: Any) -> dict[str, float]:
    """Bytes that a compiled step holds at once, donated buffers counted once; FLOPs that XLA counts in it.

    The body of a rolled loop is counted once: compare FLOPs with compute.unroll=full.
    """
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return {
        "program_bytes": held - memory.alias_size_in_bytes,
        "program_flops": compiled.cost_analysis()["flops"],
    }


def benchmark(config: ConfigDict, *, blocks: int, steps: int) -> dict[str, Any]:
    """Time `blocks` blocks of `steps` training steps of `config`, resolved, after a warm-up.

    Returns times in seconds, memory in bytes. The host waits for the device once per block; the
    step time is the median of the blocks' means, images_per_s follows from it.
    """
    batch_size = config.training.batch_size
    training = build(config)
    check_fits(training.state_shapes)
    compiled, compile_s = compile_step(config, training)
    state = training.start(None)
    shapes = batch_shapes(config, training.mesh, batch_size)
    key = jax.random.key(config.seed)
    clean = jax.random.normal(key, shapes["clean"].shape) * (method_of(config).data_std() or 0.5)
    labels = jax.random.randint(key, (batch_size,), 0, max(config.data.num_classes, 1))
    batch = {
        "clean": jax.device_put(clean, shapes["clean"].sharding),
        "labels": jax.device_put(labels, shapes["labels"].sharding),
    }

    def run(count: int) -> float:
        nonlocal state
        started = time.monotonic()
        for _ in range(count):
            state, _ = compiled(state, batch)
        jax.block_until_ready(state)
        return (time.monotonic() - started) / count

    run(WARM_UP_STEPS)
    times = [run(steps) for _ in range(blocks)]
    step_s = statistics.median(times)
    device = jax.devices()[0]
    return {
        "device": f"{device.device_kind} × {jax.device_count()}",
        "jax": jax.__version__,
        "batch_size": batch_size,
        "visible_patches": training.num_keep(0),
        "parameters": sum(x.size for x in jax.tree.leaves(training.state_shapes.params)),
        "compile_s": compile_s,
        "step_s": step_s,
        "step_s_min_max": [min(times), max(times)],
        "images_per_s": batch_size / step_s,
        **describe_program(compiled),
        "peak_bytes_in_use": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }
