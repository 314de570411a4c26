"""Sampling as `sample` does it, with fresh weights, which cost what trained ones do."""

import time
from typing import Any

import jax
import numpy as np

from maskdit_jax.benchmark.turns import Usage, measured
from maskdit_jax.config import ConfigDict, compute_of, method_of, shape_of
from maskdit_jax.data.codec import Codec
from maskdit_jax.distributed.mesh import make_mesh
from maskdit_jax.methods.method import init_params
from maskdit_jax.sampling import Model
from maskdit_jax.training.cost import FLOPS_PER_MAC, inference_macs


class SamplingRun:
    """Batches of samples of a resolved configuration; a step is a batch, to the host.

    The options are the configuration's section `sampling`, and guidance_interval. Raises UserError for one
    that cannot be.
    """

    def __init__(self, config: ConfigDict, guidance_interval: tuple[float, float] | None = None):
        self.batch_size = config.training.batch_size
        self._interval = tuple(guidance_interval) if guidance_interval else None  # JSON has lists
        method, data, compute = method_of(config), shape_of(config), compute_of(config)
        params = jax.jit(lambda: init_params(method, data, compute, config.seed))()
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
        self.model = Model(config, params, mesh, Codec(config.data.space, config.data.latent_scale))
        self.nfe = self.model.nfe(guidance_interval=self._interval)
        self.flops_per_image = self.nfe * FLOPS_PER_MAC * inference_macs(config).total()
        started = time.monotonic()
        self.run(1)
        self.compile_s = time.monotonic() - started

    def run(self, steps: int) -> None:
        """So many batches, each of other seeds."""
        per_device = self.batch_size // self.model.mesh.size
        for step in range(steps):
            seeds = np.arange(self.batch_size) + step * self.batch_size
            self.model.sample(seeds, batch_size=per_device, guidance_interval=self._interval)

    def block(self, steps: int) -> Usage:
        """So many batches, measured."""
        return measured(self.run, steps)

    def about(self) -> dict[str, Any]:
        """What it is; compile_s is the first batch, compilation and all."""
        options = self.model.sampler_options(guidance_interval=self._interval)
        return {
            "batch_size": self.batch_size,
            "solver": options.solver,
            "num_steps": options.num_steps,
            "cfg_scale": options.cfg_scale,
            "guidance_interval": options.guidance_interval,
            "network_evaluations": self.nfe,
            "flops_per_image": self.flops_per_image,
            "compile_s": self.compile_s,
        }
