"""DDPM (arXiv 2006.11239): noise in timesteps, and a network that predicts it as a denoiser.

A timestep t = 0 … T - 1 has x_t = √ᾱ·clean + √(1 - ᾱ)·noise; divided by √ᾱ it is x = clean + sigma·noise with
sigma² = (1 - ᾱ) / ᾱ, which is what denoisers and solvers here work on.
"""

import jax
import jax.numpy as jnp
import numpy as np

from maskdit_jax.diffusion.edm import Denoiser, Network, per_sample

# A timestep is one of the table's, and no point between two, where it is this close.
_SNAP = 1e-2


def linear_betas(timesteps: int) -> np.ndarray:
    """Betas [T] from 1e-4 to 0.02 at T = 1000, float64 (DDPM, sec. 4); of fewer steps the larger."""
    scale = 1000 / timesteps
    return np.linspace(1e-4 * scale, 0.02 * scale, timesteps)


def cosine_betas(timesteps: int) -> np.ndarray:
    """Betas [T] of ᾱ ~ cos²((t / T + s) / (1 + s)·π / 2), s = 0.008, float64 (arXiv 2102.09672, eq. 17)."""
    alpha_bar = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)


NOISE_SCHEDULES = {"cosine": cosine_betas, "linear": linear_betas}


def alphas_cumprod(schedule: str, timesteps: int) -> np.ndarray:
    """ᾱ [T], falling, float64: the share of the data in the variance of x_t (DDPM, eq. 4)."""
    return np.cumprod(1 - NOISE_SCHEDULES[schedule](timesteps))


def noise_levels(schedule: str, timesteps: int) -> np.ndarray:
    """sigma [T] = √((1 - ᾱ) / ᾱ), rising, float64; inf where nothing of the data is left."""
    alpha_bar = alphas_cumprod(schedule, timesteps)
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - alpha_bar) / alpha_bar)


def diffuse(clean: jax.Array, noise: jax.Array, t: jax.Array, alpha_bar: np.ndarray) -> jax.Array:
    """x_t = √ᾱ·clean + √(1 - ᾱ)·noise [B, H, W, C] at timesteps t [B] int (DDPM, eq. 4); alpha_bar [T]."""
    # Square roots in float64, of which 1 - ᾱ has digits where t is small.
    signal, added = (jnp.asarray(np.sqrt(share), jnp.float32)[t] for share in (alpha_bar, 1 - alpha_bar))
    return per_sample(signal) * clean + per_sample(added) * noise


def min_snr_weight(t: jax.Array, alpha_bar: np.ndarray, limit: float) -> jax.Array:
    """Weight [B] min(SNR, limit) / SNR of the noise's squared error at timesteps t [B] int.

    SNR = ᾱ / (1 - ᾱ) (min-SNR, arXiv 2303.09556, sec. 3.4); alpha_bar [T].
    """
    snr = alpha_bar / (1 - alpha_bar)
    return jnp.asarray(np.minimum(snr, limit) / snr, jnp.float32)[t]


def timestep_of(sigma: jax.Array, levels: np.ndarray) -> jax.Array:
    """Timestep [B] float of noise levels sigma [B]: that whose level in `levels` [T] it is.

    Between two levels it is interpolated in ln(sigma); outside of all it is the first or the last.
    """
    position = jnp.interp(jnp.log(sigma), np.log(levels), np.arange(len(levels), dtype=np.float64))
    # To the very integers on which the network was trained, which float32 logarithms only come near to.
    nearest = jnp.round(position)
    return jnp.where(jnp.abs(position - nearest) < _SNAP, nearest, position)


def epsilon_denoiser(network: Network, levels: np.ndarray) -> Denoiser:
    """Denoiser D = x - sigma·eps(x / √(1 + sigma²), t, labels) of a network that predicts the noise.

    levels [T]: the noise level of each timestep that the network knows; at any other sigma it gets a
    timestep between two.
    """

    def denoise(x, sigma, labels):
        t = timestep_of(sigma, levels)
        return x - per_sample(sigma) * network(x * per_sample(jax.lax.rsqrt(1 + sigma**2)), t, labels)

    return denoise
