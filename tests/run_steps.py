"""Script: train a small model for some steps as one process of a run; its losses and parameters to files.

Every process holds the same batches and gives its own items of them to its devices; one batch has a
NaN in its last item, so that all processes must agree to skip it. Host and device may only exchange
what the code asks them to.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from tiny import BATCH_SIZE, tiny_config

from maskdit_jax.data.pipeline import to_devices
from maskdit_jax.distributed.hosts import add_flags, joined
from maskdit_jax.distributed.mesh import batch_sharding, to_host
from maskdit_jax.distributed.peers import Peers
from maskdit_jax.training.build import build

NUM_STEPS, BAD_STEP = 20, 3


def run_steps(
    data: int, fsdp: int, recipe: str = "digits"
) -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """Metrics of each step of a tiny recipe, and the parameters and EMA after them."""
    config = tiny_config({"mesh.data": data, "mesh.fsdp": fsdp}, data * fsdp, recipe)
    training = build(config)
    state = training.start(None)
    random = np.random.default_rng(0)

    def host_batches():
        local = BATCH_SIZE // jax.process_count()
        mine = slice(jax.process_index() * local, (jax.process_index() + 1) * local)
        for step in range(NUM_STEPS + 3):
            latents = random.normal(0, 0.5, (BATCH_SIZE, 8, 8, 1)).astype(np.float32)
            label = random.integers(0, 10, BATCH_SIZE, np.int32)
            if step == BAD_STEP:
                latents[-1] = np.nan
            yield {"clean": latents[mine], "labels": label[mine]}

    device_batches = to_devices(host_batches(), batch_sharding(training.mesh))
    metrics = []
    with jax.transfer_guard("disallow"):
        for step in range(NUM_STEPS):
            state, step_metrics = training.step(state, next(device_batches), training.num_keep(step))
            metrics.append(step_metrics)
    metrics = [{k: float(v) for k, v in jax.device_get(m).items()} for m in metrics]
    return metrics, [to_host(x) for x in jax.tree.leaves((state.params, state.ema["ema"]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=int)
    parser.add_argument("--fsdp", type=int)
    parser.add_argument("--out", type=Path)
    add_flags(parser)
    flags = parser.parse_args()
    with joined(flags) as peers:
        assert isinstance(peers, Peers)
        metrics, arrays = run_steps(flags.data, flags.fsdp)
        if jax.process_index() == 0:
            flags.out.with_suffix(".json").write_text(json.dumps(metrics))
            np.savez(flags.out.with_suffix(".npz"), *arrays)


if __name__ == "__main__":
    main()
