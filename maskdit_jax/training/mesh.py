"""The device mesh, and where each array lies on it."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Arrays smaller than this are kept whole on every device: gathering them costs more than it saves.
MIN_SHARDED_SIZE = 2**14


def make_mesh(data: int, fsdp: int) -> Mesh:
    """Mesh over all devices with the axes `data` and `fsdp`."""
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Items of a batch over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def repeat_to(x: np.ndarray | jax.Array, count: int) -> np.ndarray | jax.Array:
    """`count` items: those of x [n, …], then its first ones again; so that devices divide a batch."""
    return x if len(x) == count else x[np.arange(count) % len(x)]


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A sharding for every array of a pytree of arrays or shapes: over `fsdp` where that divides it."""

    def place(x) -> NamedSharding:
        return NamedSharding(mesh, _fsdp_spec(x.shape, mesh.shape["fsdp"]))

    return jax.tree.map(place, state)


def place_shapes(shapes: Any, mesh: Mesh) -> Any:
    """A pytree of shapes as ShapeDtypeStructs that also say where each array lies: what a restore needs."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(shapes, mesh)
    )


def _fsdp_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """The longest dimension that `fsdp` divides is cut; the last such, so that stacked layers stay whole."""
    divisible = [i for i, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < MIN_SHARDED_SIZE or not divisible:
        return PartitionSpec()
    longest = max(divisible, key=lambda i: (shape[i], i))
    return PartitionSpec(*("fsdp" if i == longest else None for i in range(len(shape))))
