"""From a source to batches on the mesh: one order, read from any position by any number of processes."""

import collections
import functools
from collections.abc import Iterator

import grain
import jax
import numpy as np

from maskdit_jax.data.sources import Batch, Source
from maskdit_jax.errors import UserError

_ENDLESS = 2**40


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
    number of processes, threads or devices. Each thread reads whole batches.

    Raises:
      UserError: a thread could not read its batch, and why.
    """
    local = batch_size // process_count

    def read(number: int) -> Batch:
        start = start_item + number * batch_size + process_index * local
        items = item_order(len(source), seed, start, start + local)
        try:
            return source.read(items, np.arange(start, start + local))
        except UserError:
            raise
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            raise UserError(f"reading from item {start:,} of the run's order of the data: {cause}") from error

    # Grain's own shuffle and its reading item by item cost 13-31 µs an item on a CPU, whole batches in an
    # order of our own 3: it only runs the threads here.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(grain.MapDataset.range(_ENDLESS).map(read).to_iter_dataset(options))


def item_order(num_items: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Items at the positions start … stop - 1 of the endless order: a new shuffle for every epoch."""
    parts = []
    while start < stop:
        epoch, begin = divmod(start, num_items)
        end = min(begin + stop - start, num_items)
        parts.append(_shuffle(num_items, seed, epoch)[begin:end])
        start += end - begin
    return np.concatenate(parts)


@functools.lru_cache(maxsize=2)  # the epoch being read, and the next, which prefetching reaches first
def _shuffle(num_items: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_items)


def to_devices(
    host_batches: Iterator[Batch], sharding: jax.sharding.Sharding, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Global arrays of the batches, `ahead` of them sent before they are asked for."""
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()

    def send(batch: Batch) -> dict[str, jax.Array]:
        if sharding.is_fully_addressable:
            return jax.device_put(batch, sharding)  # all arrays in one call, which takes half the time
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

    for batch in host_batches:
        with jax.transfer_guard("allow"):  # these copies are meant; a guard set outside is for others
            queue.append(send(batch))
        if len(queue) > ahead:
            yield queue.popleft()
