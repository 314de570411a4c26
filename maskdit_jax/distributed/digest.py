"""A digest of arrays that does not depend on how they are spread over devices and processes."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def digest(tree: Any) -> str:
    """64-bit digest of a pytree of arrays: paths, shapes, types, and every bit of every value.

    Two sums, mod 2³², of each value's bits times an odd number that depends on its array's path and
    its place in it: whatever order the devices add in, the sum is the same, and no change of a
    single value leaves it as it was. It finds accidents, not forgeries.
    """
    sums: list[tuple[int, Any]] = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        salt = zlib.crc32(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode())
        sums += [(salt, _sum(x, np.uint32(salt))), (salt, _sum(x, np.uint32(salt ^ 0x9E3779B9)))]
    salted = [salt + int(x) for salt, x in jax.device_get(sums)]
    return "".join(f"{sum(half) % 2**32:08x}" for half in (salted[::2], salted[1::2]))


@jax.jit
def _sum(x: jax.Array, salt: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    return (bits * _odd_numbers(x.shape, salt)).sum(dtype=jnp.uint32)


def _odd_numbers(shape: tuple[int, ...], salt: jax.Array) -> jax.Array:
    """An odd 32-bit number for every place of an array, well mixed."""
    place = jnp.full(shape, salt)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    place = (place ^ (place >> 16)) * jnp.uint32(0x7FEB352D)  # the finaliser of a 32-bit hash
    place = (place ^ (place >> 15)) * jnp.uint32(0x846CA68B)
    return (place ^ (place >> 16)) | 1
