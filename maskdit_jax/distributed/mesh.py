"""The device mesh, and where each array lies on it."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maskdit_jax.errors import UserError
from maskdit_jax.log import counted

# Arrays smaller than this are kept whole on every device: gathering them costs more than it saves.
MIN_SHARDED_SIZE = 2**14


AXES = ("data", "fsdp")


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over the first data·fsdp devices, all processes' unless given, with the axes `data` and `fsdp`.

    A process's devices stand side by side, so that parameters are shared within a host as far as
    `fsdp` lets them, only gradients cross the network, and a process's items of a batch are
    consecutive.
    """
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    return Mesh(np.array(devices[: data * fsdp]).reshape(data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Items of a batch over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def whole_sharding(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def to_mesh(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds whole, as one array on the devices of all of them."""
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array on every process, wherever its parts lie."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def repeat_to(x: np.ndarray | jax.Array, count: int) -> np.ndarray | jax.Array:
    """`count` items: those of x [n, …], then its first ones again; so that devices divide a batch."""
    return x if len(x) == count else x[np.arange(count) % len(x)]


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A sharding for every array of a pytree of arrays or shapes: over `fsdp` where that divides it."""

    return jax.tree.map(lambda x: NamedSharding(mesh, _fsdp_spec(x.shape, mesh)), state)


def place_shapes(shapes: Any, mesh: Mesh) -> Any:
    """A pytree of shapes as ShapeDtypeStructs that also say where each array lies: what a restore needs."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(shapes, mesh)
    )


def bytes_of(state: Any) -> tuple[int, int]:
    """Bytes of the arrays or ShapeDtypeStructs of a pytree: all of them whole, and what one device holds."""
    whole = each = 0
    for x in jax.tree.leaves(state):
        whole += x.size * x.dtype.itemsize
        each += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return whole, each


def memory_of_device() -> int:
    """Bytes that one device of this process can hold; CPU devices share the machine's memory evenly."""
    device = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def check_fits(state: Any) -> None:
    """Compare a state's ShapeDtypeStructs with the memory of a device, before anything is allocated.

    Raises:
      UserError: one device's part of the state alone is larger.
    """
    (whole, each), limit = bytes_of(state), memory_of_device()
    if each > limit:
        raise UserError(
            f"parameters, EMA and optimizer take {whole / 1e9:,.1f} GB, {each / 1e9:,.1f} GB of them on each "
            f"device, which has {limit / 1e9:,.1f} GB: choose a smaller network, or share them between "
            "more devices with mesh.fsdp"
        )


def describe_placement(state: Any, mesh: Mesh) -> str:
    """What of the state is cut over `fsdp`, what is whole everywhere, and what that costs each device."""
    arrays = jax.tree.leaves(state)
    kept = [x for x in arrays if x.sharding.is_fully_replicated]
    whole, each = bytes_of(arrays)
    text = (
        f"parameters, EMA and optimizer: {whole / 1e6:,.1f} MB, {each / 1e6:,.1f} MB ({each / whole:.1%}) on "
        f"each device: {counted(len(arrays) - len(kept), 'array')} cut over fsdp={mesh.shape['fsdp']}, "
        f"{len(kept)} whole ({bytes_of(kept)[0] / 1e6:,.1f} MB)"
    )
    spans = len({device.process_index for device in mesh.devices[0]})
    across = f"; fsdp spans {spans} processes: keep these on one host, or parameters cross the network"
    return text + across * (spans > 1)


def _fsdp_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The longest dimension that `fsdp` divides is cut; the last such, so that stacked layers stay whole."""
    fsdp = mesh.shape["fsdp"]
    divisible = [i for i, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < MIN_SHARDED_SIZE or not divisible:
        return PartitionSpec()
    longest = max(divisible, key=lambda i: (shape[i], i))
    return PartitionSpec(*("fsdp" if i == longest else None for i in range(len(shape))))


def mean_over_devices(
    gradient: Callable[[Any, Any], tuple[Any, Any]], mesh: Mesh
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """gradient(params, items) → (gradient like params, metrics), as the average over all devices' items.

    Each device sees whole parameters, gathered from their shards, and its own items of the batch;
    of the mean it keeps what `state_shardings` gives it (ZeRO, arXiv 1910.02054). The collectives are
    written out because, left to the compiler, bfloat16 products are summed between devices in
    bfloat16 and activations are moved about to suit the cut of the parameters.
    """

    def gather(shard, spec):
        if spec == PartitionSpec():
            return shard
        return jax.lax.all_gather(shard, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True)

    def average(x, spec):
        x = x.astype(jnp.float32) / mesh.size
        if spec == PartitionSpec():
            return jax.lax.psum(x, AXES)
        cut = tuple(spec).index("fsdp")
        return jax.lax.psum(jax.lax.psum_scatter(x, "fsdp", scatter_dimension=cut, tiled=True), "data")

    def mean_gradient(params, items):
        specs = jax.tree.map(lambda x: _fsdp_spec(x.shape, mesh), params)

        def on_one_device(shards, items):
            grads, metrics = gradient(jax.tree.map(gather, shards, specs), items)
            return jax.tree.map(average, grads, specs), jax.lax.pmean(metrics, AXES)

        # check_vma=False: with it, differentiation would insert reductions of its own, in bfloat16.
        return jax.shard_map(
            on_one_device,
            mesh=mesh,
            in_specs=(specs, PartitionSpec(AXES)),
            out_specs=(specs, PartitionSpec()),
            check_vma=False,
        )(params, items)

    return mean_gradient
