"""From a source to batches on the mesh: one order, read from any position by any number of processes."""

import collections
from collections.abc import Iterator

import grain
import jax
import numpy as np

from maskdit_jax.data.sources import Source

Batch = dict[str, np.ndarray]


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_item: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 1,
) -> Iterator[Batch]:
    """Endless batches of this process, [batch_size / process_count, …] each.

    The whole run has one order of items, a function of the seed alone: every epoch is its own
    shuffle, item `start_item` of that order comes first, and the processes' parts of a batch follow
    each other in it. So the position of a run is one number, the items consumed, whatever the
    number of processes, threads or devices.
    """
    local = batch_size // process_count
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    dataset = dataset[start_item:].batch(local, drop_remainder=True)[process_index::process_count]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(dataset.to_iter_dataset(options))


def to_devices(
    host_batches: Iterator[Batch], sharding: jax.sharding.Sharding, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Global arrays of the batches, `ahead` of them sent before they are asked for."""
    queue = collections.deque()
    for batch in host_batches:
        queue.append({k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()})
        if len(queue) > ahead:
            yield queue.popleft()
