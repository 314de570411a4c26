"""A side of a comparison: a configuration with overrides, trained or sampled."""

import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from maskdit_jax.benchmark.ceiling import matmul_flops_per_s
from maskdit_jax.benchmark.memory import allocator_peak, process_peak
from maskdit_jax.benchmark.sampling import SamplingRun
from maskdit_jax.benchmark.step import StepRun
from maskdit_jax.benchmark.turns import spread
from maskdit_jax.config import ConfigDict, resolve
from maskdit_jax.config_file import load
from maskdit_jax.distributed.hosts import check_devices
from maskdit_jax.errors import UserError

Run = StepRun | SamplingRun


class Side(NamedTuple):
    """batch: items of a step, or None, the configuration's. sampling: samples instead of training steps."""

    config: str
    overrides: list[str]
    batch: int | None = None
    sampling: bool = False
    guidance_interval: tuple[float, float] | None = None

    def loaded(self) -> ConfigDict:
        """The configuration; no device is touched.

        Raises:
          UserError: there is no such file or option.
        """
        config = load(self.config, self.overrides)
        if self.batch is not None:
            config.training.batch_size = self.batch
        return config

    def resolved(self) -> ConfigDict:
        """The configuration for the devices that there are.

        Raises:
          UserError: it cannot be.
        """
        return self.resolve(self.loaded())

    def resolve(self, config: ConfigDict) -> ConfigDict:
        """`config`, as `loaded` gives it, for the devices that there are.

        Raises:
          UserError: it cannot be.
        """
        check_devices()
        return resolve(config, device_count=jax.device_count())

    def start(self) -> Run:
        """Compiled, with its state on the device."""
        config = self.resolved()
        return SamplingRun(config, self.guidance_interval) if self.sampling else StepRun(config)


def parse_side(text: str, common: Side) -> Side:
    """A side in words: a configuration (default: that of `common`), and options such as compute.remat=mlp.

    Raises:
      UserError: no configuration, or more than one.
    """
    words = shlex.split(text)
    configs = [word for word in words if "=" not in word]
    options = [f"--config.{word}" for word in words if "=" in word]
    if len(configs) > 1 or not (configs or common.config):
        raise UserError(
            f"--compare={text!r} names {len(configs)} configurations: name one, in each side or by --config"
        )
    return common._replace(config=(configs or [common.config])[0], overrides=[*common.overrides, *options])


def parse_sides(texts: Sequence[str], common: Side) -> dict[str, Side]:
    """Two sides or more by what they are called, their words.

    Raises:
      UserError: fewer, or two alike.
    """
    if len(texts) < 2 or len(set(texts)) < len(texts):
        raise UserError(f"--compare is given {len(texts)} sides: expected two or more, each another")
    return {text: parse_side(text, common) for text in texts}


def measure_sampling(side: Side, blocks: int) -> dict[str, Any]:
    """Samples a second, of blocks of one batch each; matmul_flops_per_s and utilisation as in `benchmark`."""
    config = side.resolved()
    run = SamplingRun(config, side.guidance_interval)
    batch_s, fastest, slowest = spread([run.block(1).wall_s for _ in range(blocks)])
    peaks = {"peak_bytes_in_use": allocator_peak(), "peak_bytes_of_process": process_peak()}
    matmul, matmul_side = matmul_flops_per_s(config.compute.precision)
    images_per_s = run.batch_size / batch_s
    return {
        **run.about(),
        "batch_s": batch_s,
        "batch_s_min_max": [fastest, slowest],
        "images_per_s": images_per_s,
        "matmul_flops_per_s": matmul,
        "matmul_side": matmul_side,
        "utilisation": images_per_s * run.flops_per_image / (matmul * jax.device_count()),
        **peaks,
    }
