"""From the moments of the autoencoder's posterior to the latents that the model sees."""

import jax
import jax.numpy as jnp

LOGVAR_RANGE = (-30.0, 20.0)


def draw_latents(moments: jax.Array, noise: jax.Array, latent_scale: float) -> jax.Array:
    """latents = latent_scale·(mean + exp(logvar / 2)·noise), logvar clipped to [-30, 20]; float32.

    moments [B, H, W, 2C] are mean and log-variance of the autoencoder's posterior; noise [B, H, W, C].
    """
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return latent_scale * (mean + jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR_RANGE)) * noise)
