"""A digest of arrays that does not depend on how they are spread over devices and processes."""

import math
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Values that a host digests at a time: of every shape and type by this one program. One for each shape, as
# on a device, takes a CPU longer to compile than a small state takes to save.
_BLOCK = 2**20


def digest(tree: Any) -> str:
    """64-bit digest of a pytree of arrays: paths, shapes, types, and every bit of every value.

    Two sums, mod 2³², of each value's bits times an odd number that depends on its array's path and
    its place in it: whatever order the devices add in, the sum is the same, and no change of a
    single value leaves it as it was. It finds accidents, not forgeries.
    """
    sums: list[jax.Array] = []
    salts: list[int] = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        salt = zlib.crc32(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode())
        salts.append(salt)
        pair = np.array([salt, salt ^ 0x9E3779B9], np.uint32)
        if (values := _values_on_host(x)) is None:
            sums.append(_sums(x, pair))
        else:
            # Consecutive places' numbers differ by nothing but the salt, to which a block's place is added.
            sums += [_block_sums(bits, pair + np.uint32(start)) for start, bits in _blocks(values)]
    total = sum((part.astype(np.int64) for part in jax.device_get(sums)), np.zeros(2, np.int64))
    return "".join(f"{(int(half) + sum(salts)) % 2**32:08x}" for half in total)


def _values_on_host(x: jax.Array | np.ndarray) -> np.ndarray | None:
    """The array as the host's memory holds it, not copied; None where it lies on a device, or in parts."""
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if x.is_fully_addressable and x.is_fully_replicated and all(d.platform == "cpu" for d in x.devices()):
        return np.asarray(x.addressable_data(0))
    return None


def _blocks(values: np.ndarray) -> Iterator[tuple[int, jax.Array]]:
    """Bits [_BLOCK] uint32 and the place (mod 2³²) of the first; zeros, which add nothing, fill the last."""
    flat = np.ascontiguousarray(values).reshape(-1).view(f"uint{8 * values.dtype.itemsize}")
    for start in range(0, flat.size, _BLOCK):
        bits = flat[start : start + _BLOCK].astype(np.uint32, copy=False)
        if bits.size < _BLOCK:
            bits = np.pad(bits, (0, _BLOCK - bits.size))
        yield start % 2**32, jax.device_put(bits, jax.local_devices(backend="cpu")[0], may_alias=True)


@jax.jit
def _block_sums(bits: jax.Array, salts: jax.Array) -> jax.Array:
    # Columns first: a CPU adds many at a time.
    columns = [x.sum(0, dtype=jnp.uint32) for x in _weighted(bits.reshape(-1, 2048), salts)]
    return jnp.stack(columns).sum(1, dtype=jnp.uint32)


@jax.jit
def _sums(x: jax.Array, salts: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    return jnp.stack([weighted.sum(dtype=jnp.uint32) for weighted in _weighted(bits, salts)])


def _weighted(bits: jax.Array, salts: jax.Array) -> list[jax.Array]:
    """The bits times an odd 32-bit number of each one's place, well mixed, for each of the `salts` [2]."""
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    return [bits * _odd_numbers(place + salt) for salt in salts]


def _odd_numbers(place: jax.Array) -> jax.Array:
    place = (place ^ (place >> 16)) * jnp.uint32(0x7FEB352D)  # the finaliser of a 32-bit hash
    place = (place ^ (place >> 15)) * jnp.uint32(0x846CA68B)
    return (place ^ (place >> 16)) | 1
