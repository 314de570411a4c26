"""Guidance: away from a weak side, which is the network without its label, or another network."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdit_jax.diffusion.ddpm import timestep_of
from maskdit_jax.diffusion.edm import Denoiser, per_sample

NULL_LABEL = -1  # "no class"; each network knows its own way to be told so


def drop_labels(key: jax.Array, labels: jax.Array, share: float) -> jax.Array:
    """Labels [B], each replaced by "no class" with probability `share`.

    Here and nowhere else: dropped once more in the network, as some codes do, 19 % would be lost, not 10.
    """
    return jnp.where(jax.random.bernoulli(key, share, labels.shape), NULL_LABEL, labels)


# (x, sigma, labels) → what the strong and the weak side make of x, [B, H, W, C] each.
Sides = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def null_label_sides(denoise: Denoiser) -> Sides:
    """The weak side is the same network, told no class: both in one call (MaskDiT, sec. 4)."""

    def sides(x, sigma, labels):
        both = denoise(
            jnp.concatenate([x, x]),
            jnp.concatenate([sigma, sigma]),
            jnp.concatenate([labels, jnp.full_like(labels, NULL_LABEL)]),
        )
        strong, weak = jnp.split(both, 2)
        return strong, weak

    return sides


def network_sides(denoise: Denoiser, weak: Denoiser) -> Sides:
    """The weak side is another network, told the same labels (autoguidance, arXiv 2406.02507)."""
    return lambda x, sigma, labels: (denoise(x, sigma, labels), weak(x, sigma, labels))


class Growth(NamedTuple):
    """Of guidance from 1 to its scale s: 1 + (s - 1)·(1 - cos(π·(1 - t/T)^power)) / 2 at timestep t of T.

    MDT (arXiv 2303.14389, sec. 4.1), with power 4. levels [T]: the noise level of each timestep.
    """

    power: float
    levels: np.ndarray

    def scale(self, sigma: jax.Array, cfg_scale: float) -> jax.Array:
        """Scale [B] at noise levels sigma [B]."""
        passed = 1 - timestep_of(sigma, self.levels) / len(self.levels)
        return 1 + (cfg_scale - 1) * (1 - jnp.cos(jnp.pi * passed**self.power)) / 2


def guide(sides: Sides, cfg_scale: float, channels: int = 0, growth: Growth | None = None) -> Denoiser:
    """Denoiser weak + cfg_scale·(strong - weak); at 1 it is the strong side, at the cost of both.

    channels: of the first so many, by default all that x has; what is behind them is the strong side's.
    """

    def guided(x, sigma, labels):
        strong, weak = sides(x, sigma, labels)
        count = min(channels or x.shape[-1], x.shape[-1])
        scale = cfg_scale if growth is None else per_sample(growth.scale(sigma, cfg_scale))
        some = weak[..., :count] + scale * (strong[..., :count] - weak[..., :count])
        return jnp.concatenate([some, strong[..., count:]], axis=-1)

    return guided


def is_guided(sigma: np.ndarray, cfg_scale: float, interval: tuple[float, float] | None) -> np.ndarray:
    """Whether guidance acts, for noise levels of any shape: where low < sigma <= high of the interval.

    None: everywhere; a scale of 1 acts nowhere. Beyond it guidance costs nothing (arXiv 2404.07724).
    """
    if cfg_scale == 1:
        return np.zeros(np.shape(sigma), bool)
    low, high = (-np.inf, np.inf) if interval is None else interval
    # As samples are computed, so that a highest level of 80 is not above 80 by float64's last digit.
    rounded, ends = np.asarray(sigma, np.float32), np.array([low, high], np.float64)
    with np.errstate(over="ignore"):
        low, high = ends.astype(np.float32)
    return (low < rounded) & (rounded <= high)
