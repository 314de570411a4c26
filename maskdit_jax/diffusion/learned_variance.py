"""DDPM with a learned variance (arXiv 2102.09672, sec. 3): networks whose second half of channels is one.

The variance of a step is at least that of q(x_{t-1} | x_t, clean) and at most beta_t; between them a value v
of the network chooses: ln(variance) = share·ln(beta_t) + (1 - share)·ln(least), share = (v + 1) / 2.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdit_jax.diffusion.ddpm import timestep_of
from maskdit_jax.diffusion.edm import Denoiser, Network, per_sample

_HALF_BIN = 1 / 255  # half of the distance of two of 256 levels in -1 … 1
_BEYOND = 0.999  # from here outwards a level takes all that lies beyond it
_LEAST = 1e-12  # probability of which a logarithm is taken


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, clean) of every timestep [T], float64 (DDPM, arXiv 2006.11239, eq. 7).

    Its mean is of_clean·clean + of_noisy·x_t. The first log_variance, of a variance 0, repeats the second.
    """

    variance: np.ndarray
    log_variance: np.ndarray
    of_clean: np.ndarray
    of_noisy: np.ndarray


def posterior(betas: np.ndarray) -> Posterior:
    """The posterior of a process with these betas [T]."""
    alpha_bar = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bar[:-1])
    variance = betas * (1 - before) / (1 - alpha_bar)
    of_clean = betas * np.sqrt(before) / (1 - alpha_bar)
    of_noisy = (1 - before) * np.sqrt(1 - betas) / (1 - alpha_bar)
    return Posterior(variance, np.log(np.append(variance[1], variance[1:])), of_clean, of_noisy)


def split_prediction(prediction: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Noise and variance's share, [B, H, W, C] each, of what a network makes [B, H, W, 2C]."""
    noise, value = jnp.split(prediction, 2, axis=-1)
    return noise, (value + 1) / 2


def noise_and_variance_loss(
    prediction: jax.Array, clean: jax.Array, noise: jax.Array, t: jax.Array, betas: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Squared error of the noise, and the bound that teaches the variance, [B] each (sec. 3.1: L_hybrid).

    The second is bits per value of one term of the variational bound, not times the T terms; its gradient
    reaches the variance only. prediction [B, H, W, 2C], clean and noise [B, H, W, C], t [B] int, betas [T].
    """
    predicted, share = split_prediction(prediction)
    squared_error = jnp.square(predicted - noise).mean(axis=(1, 2, 3))
    return squared_error, variational_bound(jax.lax.stop_gradient(predicted), share, clean, noise, t, betas)


def variational_bound(
    predicted: jax.Array,
    share: jax.Array,
    clean: jax.Array,
    noise: jax.Array,
    t: jax.Array,
    betas: np.ndarray,
) -> jax.Array:
    """Bits per value [B] of timestep t's term of the variational bound (DDPM, eq. 5).

    The divergence of p(x_{t-1} | x_t) from the posterior; at t = 0 minus the log-likelihood of clean data.
    Predicted and true noise, the share of the variance and clean data [B, H, W, C].
    """
    of_process, alpha_bar = posterior(betas), np.cumprod(1 - betas)

    def at(table):
        return per_sample(jnp.asarray(table, jnp.float32)[t])

    least = at(of_process.log_variance)
    log_variance = share * at(np.log(betas)) + (1 - share) * least
    # Of the estimates of clean data; that of their difference is exact where both are large.
    off = at(np.sqrt((1 - alpha_bar) / alpha_bar)) * (noise - predicted)
    distance = at(of_process.of_clean) * off
    divergence = 0.5 * (
        log_variance - least - 1 + jnp.exp(least - log_variance) + distance**2 * jnp.exp(-log_variance)
    )
    surprise = -_log_likelihood(clean, clean + off, jnp.exp(-0.5 * log_variance))
    term = jnp.where(per_sample(t) == 0, surprise, divergence)
    return term.mean(axis=(1, 2, 3)) / math.log(2)


def _log_likelihood(x: jax.Array, mean: jax.Array, inverse_std: jax.Array) -> jax.Array:
    """Of x in -1 … 1 as one of 256 levels, of which each takes its part of a normal (DDPM, eq. 13)."""
    upper = _normal_cdf((x - mean + _HALF_BIN) * inverse_std)
    lower = _normal_cdf((x - mean - _HALF_BIN) * inverse_std)
    mass = jnp.where(x < -_BEYOND, upper, jnp.where(x > _BEYOND, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, _LEAST))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """As the published models were trained with: Φ of the approximate GELU (arXiv 1606.08415, sec. 2)."""
    return 0.5 * (1 + _tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@jax.custom_jvp
def _tanh(y: jax.Array) -> jax.Array:
    """Right to its last bit near 1, as XLA's is not: of what is left a logarithm is taken."""
    return jnp.sign(y) * (1 - 2 / (1 + jnp.exp(2 * jnp.minimum(jnp.abs(y), 20))))


@_tanh.defjvp
def _tanh_jvp(primals, tangents):
    value = _tanh(*primals)
    return value, (1 - value**2) * tangents[0]  # of the rounded value, as the logarithm's argument is


def variance_denoiser(network: Network, levels: np.ndarray) -> Denoiser:
    """Denoiser of a network that predicts noise and variance: [B, H, W, 2C], the share behind clean data.

    levels [T]: the noise level of each timestep, as of `epsilon_denoiser`.
    """

    def denoise(x, sigma, labels):
        scaled = x * per_sample(jax.lax.rsqrt(1 + sigma**2))
        noise, share = split_prediction(network(scaled, timestep_of(sigma, levels), labels))
        return jnp.concatenate([x - per_sample(sigma) * noise, share], axis=-1)

    return denoise
