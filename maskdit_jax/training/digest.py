"""A digest of arrays that does not depend on how they are spread over devices and processes."""

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp


def digest(tree: Any) -> str:
    """64-bit digest of a pytree of arrays: paths, shapes, types, and every bit of every value.

    Two sums, mod 2³², of each value's bits times an odd number that depends on its array's path and
    its place in it: whatever order the devices add in, the sum is the same, and no change of a
    single value leaves it as it was. It finds accidents, not forgeries.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}" for path, x in leaves]
    salts = tuple(zlib.crc32(name.encode()) for name in names)
    sums = _sums([x for _, x in leaves], salts)
    return "".join(f"{int(x):08x}" for x in jax.device_get(sums))


@functools.partial(jax.jit, static_argnums=1)
def _sums(arrays: list[jax.Array], salts: tuple[int, ...]) -> list[jax.Array]:
    sums = [jnp.uint32(0), jnp.uint32(0)]
    for x, salt in zip(arrays, salts, strict=True):
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        for i, seed in enumerate((salt, salt ^ 0x9E3779B9)):
            sums[i] += jnp.uint32(seed) + (bits * _odd_numbers(x.shape, seed)).sum(dtype=jnp.uint32)
    return sums


def _odd_numbers(shape: tuple[int, ...], seed: int) -> jax.Array:
    """An odd 32-bit number for every place of an array, well mixed."""
    place = jnp.full(shape, seed, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    place = (place ^ (place >> 16)) * jnp.uint32(0x7FEB352D)  # the finaliser of a 32-bit hash
    place = (place ^ (place >> 15)) * jnp.uint32(0x846CA68B)
    return (place ^ (place >> 16)) | 1
