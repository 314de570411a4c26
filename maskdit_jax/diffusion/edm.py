"""EDM (arXiv 2206.00364): noise levels of training, preconditioning, loss weight."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Network = Callable[..., jax.Array]  # F(x, c_noise, labels, mask) → [B, H, W, C]
# D(x, sigma, labels, mask) → [B, H, W, C]. Where the variance of steps is learned, [B, H, W, 2C]: behind D
# its share, see learned_variance.py.
Denoiser = Callable[..., jax.Array]


def per_sample(values: jax.Array) -> jax.Array:
    """[B] → [B, 1, 1, 1], to multiply images."""
    return values[:, None, None, None]


def draw_sigma(key: jax.Array, batch_size: int, P_mean: float, P_std: float) -> jax.Array:
    """Noise levels [B] with ln(sigma) ~ N(P_mean, P_std²) (EDM, table 1)."""
    return jnp.exp(P_mean + P_std * jax.random.normal(key, (batch_size,)))


def coefficients(sigma: jax.Array, sigma_data: float) -> tuple[jax.Array, ...]:
    """c_skip, c_out, c_in, c_noise, each shaped like sigma (EDM, table 1)."""
    variance = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / variance
    c_out = sigma * sigma_data * jax.lax.rsqrt(variance)
    c_in = jax.lax.rsqrt(variance)
    c_noise = jnp.log(sigma) / 4
    return c_skip, c_out, c_in, c_noise


def loss_weight(sigma: jax.Array, sigma_data: float) -> jax.Array:
    """w(sigma) = (sigma² + sigma_data²) / (sigma·sigma_data)² (EDM, table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def precondition(network: Network, sigma_data: float) -> Denoiser:
    """Denoiser D(x, sigma) = c_skip·x + c_out·F(c_in·x, c_noise) (EDM, eq. 7), in the dtype of x."""

    def denoise(x, sigma, labels, mask=None):
        c_skip, c_out, c_in, c_noise = coefficients(sigma, sigma_data)
        prediction = network(per_sample(c_in) * x, c_noise, labels, mask)
        return per_sample(c_skip) * x + per_sample(c_out) * prediction

    return denoise
