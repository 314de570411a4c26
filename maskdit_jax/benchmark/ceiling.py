"""What the device can do at best, measured in the same run: a matrix product, and a copy."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maskdit_jax.models.compute import PRECISIONS

GPU_SIDE, CPU_SIDE = 8192, 2048
GPU_COPY, CPU_COPY = 2**30, 2**27  # bytes
BLOCKS = 3


def matmul_flops_per_s(precision: str) -> tuple[float, int]:
    """FLOP/s of one device in a product of two square matrices of random numbers, and their side.

    Random, because zeros run faster where the clock follows the power. The best of three blocks.
    """
    dtype, matmul_precision = PRECISIONS[precision]
    side = _side()
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (side, side)).astype(dtype) for key in keys)
    product = jax.jit(functools.partial(jnp.matmul, precision=matmul_precision))
    return 2 * side**3 / _seconds(lambda: product(left, right)), side


def copy_bytes_per_s() -> float:
    """Bytes read and written a second by one device that adds 1 to a large array."""
    size = GPU_COPY if jax.default_backend() == "gpu" else CPU_COPY
    x = jax.random.normal(jax.random.key(0), (size // 4,))
    add = jax.jit(lambda x: x + 1)
    return 2 * size / _seconds(lambda: add(x))


def describe_device() -> dict[str, Any]:
    """The device, and its ceilings in every precision."""
    matmul = {precision: matmul_flops_per_s(precision)[0] for precision in PRECISIONS}
    return {
        "device": f"{jax.devices()[0].device_kind} × {jax.device_count()}",
        "jax": jax.__version__,
        "matmul_flops_per_s": matmul,
        "matmul_side": _side(),
        "copy_bytes_per_s": copy_bytes_per_s(),
    }


def _side() -> int:
    return GPU_SIDE if jax.default_backend() == "gpu" else CPU_SIDE


def _seconds(call: Callable[[], jax.Array]) -> float:
    """Of one call, the best of some blocks of a tenth of a second or more."""
    jax.block_until_ready(call())
    started = time.monotonic()
    jax.block_until_ready(call())
    count = max(round(0.1 / (time.monotonic() - started)), 1)
    times = []
    for _ in range(BLOCKS):
        started = time.monotonic()
        jax.block_until_ready([call() for _ in range(count)][-1])
        times.append((time.monotonic() - started) / count)
    return min(times)
