"""Guidance: away from a weak side, which is the network without its label, or another network."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from maskdit_jax.diffusion.edm import Denoiser

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


def guide(sides: Sides, cfg_scale: float, channels: int = 0) -> Denoiser:
    """Denoiser weak + cfg_scale·(strong - weak); at 1 it is the strong side, at the cost of both.

    channels: of the first so many, by default all that x has; what is behind them is the strong side's.
    """

    def guided(x, sigma, labels):
        strong, weak = sides(x, sigma, labels)
        count = min(channels or x.shape[-1], x.shape[-1])
        some = weak[..., :count] + cfg_scale * (strong[..., :count] - weak[..., :count])
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
