"""A configuration's training step on synthetic data that stay on the device: no files, no TensorFlow."""

import time
from typing import Any

import jax

from maskdit_jax.benchmark.ceiling import matmul_flops_per_s
from maskdit_jax.benchmark.memory import allocator_peak, process_peak
from maskdit_jax.benchmark.turns import Usage, measured, spread
from maskdit_jax.config import ConfigDict, method_of
from maskdit_jax.distributed.mesh import check_fits
from maskdit_jax.training.build import Training, batch_shapes, build
from maskdit_jax.training.cost import train_flops_per_image

WARM_UP_STEPS = 3


class StepRun:
    """The step of a resolved configuration, compiled, with a state of its own and a batch."""

    def __init__(self, config: ConfigDict):
        self.config, self.batch_size = config, config.training.batch_size
        self.training = build(config)
        check_fits(self.training.state_shapes)
        self.compiled, self.compile_s = compile_step(config, self.training)
        self._state = self.training.start(None)
        self._batch = synthetic_batch(config, self.training)

    def run(self, steps: int) -> None:
        """So many steps, waited for once."""
        for _ in range(steps):
            self._state, _ = self.compiled(self._state, self._batch)
        jax.block_until_ready(self._state)

    def block(self, steps: int) -> Usage:
        """So many steps, measured."""
        return measured(self.run, steps)

    def about(self) -> dict[str, Any]:
        """What it is: device, batch, tokens, parameters, compile time, and its program."""
        device = jax.devices()[0]
        return {
            "device": f"{device.device_kind} × {jax.device_count()}",
            "jax": jax.__version__,
            "batch_size": self.batch_size,
            "visible_patches": self.training.num_keep(0),
            "parameters": sum(x.size for x in jax.tree.leaves(self.training.state_shapes.params)),
            "flops_per_image": train_flops_per_image(self.config),
            "compile_s": self.compile_s,
            **describe_program(self.compiled),
        }


def compile_step(config: ConfigDict, training: Training) -> tuple[Any, float]:
    """The step that `build` made of `config`, compiled from shapes for its first mask ratio; seconds."""
    shapes = batch_shapes(config, training.mesh, config.training.batch_size)
    started = time.monotonic()
    lowered = training.step.lower(training.state_shapes, shapes, training.num_keep(0))
    return lowered.compile(), time.monotonic() - started


def synthetic_batch(config: ConfigDict, training: Training) -> dict[str, jax.Array]:
    """Clean data of the standard deviation that the method assumes, and labels, on the device."""
    shapes = batch_shapes(config, training.mesh, config.training.batch_size)
    key = jax.random.key(config.seed)
    clean = jax.random.normal(key, shapes["clean"].shape) * (method_of(config).data_std() or 0.5)
    labels = jax.random.randint(key, shapes["labels"].shape, 0, max(config.data.num_classes, 1))
    return {
        "clean": jax.device_put(clean, shapes["clean"].sharding),
        "labels": jax.device_put(labels, shapes["labels"].sharding),
    }


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
    step time is the median of the blocks' means, images_per_s follows from it. utilisation: FLOPs that the
    method needs (recomputation is none), as a share of those of a large matrix product of the same
    precision on all devices, measured here too. peak_bytes_in_use: of the device's allocator, where it
    counts; peak_bytes_of_process: of this whole process, compilation and all.
    """
    side = StepRun(config)
    side.run(WARM_UP_STEPS)
    step_s, fastest, slowest = spread([side.block(steps).wall_s for _ in range(blocks)])
    peaks = {"peak_bytes_in_use": allocator_peak(), "peak_bytes_of_process": process_peak()}
    matmul, matmul_side = matmul_flops_per_s(config.compute.precision)
    images_per_s, about = side.batch_size / step_s, side.about()
    return {
        **about,
        "step_s": step_s,
        "step_s_min_max": [fastest, slowest],
        "images_per_s": images_per_s,
        "flops_per_s": images_per_s * about["flops_per_image"],
        "matmul_flops_per_s": matmul,
        "matmul_side": matmul_side,
        "utilisation": images_per_s * about["flops_per_image"] / (matmul * jax.device_count()),
        **peaks,
    }
