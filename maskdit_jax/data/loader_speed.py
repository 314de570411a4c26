"""Speed of the loader on a folder of moments, beside that of a bare read of the same items."""

import itertools
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from maskdit_jax.data.pipeline import batches, item_order
from maskdit_jax.data.shards import finish_shards, open_shards, read_report, shard_names, write_shard
from maskdit_jax.data.sources import LatentShards


def write_synthetic_shards(folder: Path, num_images: int, shard_size: int = 4096) -> None:
    """Random moments of 32×32×4 latents, float16, two views each: what ImageNet at 256 px becomes."""
    rng = np.random.default_rng(0)
    names = shard_names(-(-num_images // shard_size))
    for i, name in enumerate(names):
        count = min(shard_size, num_images - i * shard_size)
        moments = rng.standard_normal((count, 2, 32, 32, 8), np.float32).astype(np.float16)
        write_shard(folder, name, moments, rng.integers(0, 1000, count))
    reports = [report for name in names if (report := read_report(folder, name, verify=False))]
    finish_shards(folder, reports, num_classes=1000, latent_scale=0.18215, about={"source": "synthetic"})


def benchmark_loader(
    folder: Path, *, batch_size: int, num_threads: int, rounds: int, batches_per_round: int
) -> dict[str, Any]:
    """Items per second of the loader and of a bare batched read in turns, medians; memory over the run.

    The bare read indexes the memory maps of the shards with the same items, a shard at a time, and
    puts nothing together.
    """
    source = LatentShards(str(folder))
    shards = [shard.moments for shard in open_shards(folder)[1]]
    starts = np.cumsum([0] + [len(shard) for shard in shards])
    views, seed = shards[0].shape[1], 0
    loader = batches(source, batch_size=batch_size, seed=seed, num_threads=num_threads)

    def bare(first_batch: int) -> None:
        for number in range(first_batch, first_batch + batches_per_round):
            items = item_order(len(source), seed, number * batch_size, (number + 1) * batch_size)
            images, view = np.divmod(items, views)
            shard = np.searchsorted(starts, images, side="right") - 1
            for i in np.unique(shard):
                chosen = shard == i
                shards[i][images[chosen] - starts[i], view[chosen]]

    def seconds(work) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    next(loader)  # threads started, the first epoch shuffled
    ours, bare_speed, memory = [], [], []
    for i in range(rounds):
        items = batches_per_round * batch_size
        bare_speed.append(items / seconds(lambda i=i: bare(1 + i * batches_per_round)))
        read = itertools.islice(loader, batches_per_round)
        ours.append(items / seconds(lambda read=read: [None for _ in read]))
        memory.append(_memory_mb())
    return {
        "items": len(source),
        "batch_size": batch_size,
        "num_threads": num_threads,
        "rounds": rounds,
        "loader_items_per_s": statistics.median(ours),
        "bare_items_per_s": statistics.median(bare_speed),
        "ratio": statistics.median(ours) / statistics.median(bare_speed),
        "anonymous_memory_mb": [memory[rounds // 4], memory[-1]],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _memory_mb() -> float:
    """Memory of the process that is its own: the pages of the memory maps belong to the system."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon"))
