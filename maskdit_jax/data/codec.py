"""What stands between the data and the model: cached moments → latents → images."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

LOGVAR_RANGE = (-30.0, 20.0)


class Decoder(Protocol):
    """What a codec needs of an autoencoder."""

    def decode(self, raw_latents: jax.Array) -> jax.Array: ...


class Codec(NamedTuple):
    """From what a source gives to what the model sees, and from its samples to images.

    space: "pixels", which the model sees as they are, or "latents": latent_scale times the output of
    `autoencoder`, without which samples stay latents.
    """

    space: str
    latent_scale: float
    autoencoder: Decoder | None = None

    @property
    def makes_pixels(self) -> bool:
        """Whether samples are images; otherwise they are latents."""
        return self.space == "pixels" or self.autoencoder is not None

    def clean(self, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """The batch with `clean` [B, H, W, C] float32: as it is, or a new draw from cached `moments`."""
        if "clean" in batch:
            return batch
        rest = dict(batch)
        moments = rest.pop("moments")
        noise = jax.random.normal(key, (*moments.shape[:-1], moments.shape[-1] // 2))
        return rest | {"clean": draw_latents(moments, noise, self.latent_scale)}

    def images(self, samples: jax.Array) -> jax.Array:
        """Images [B, H, W, C] in [-1, 1], about, of samples; without an autoencoder latents stay latents."""
        return self.autoencoder.decode(samples / self.latent_scale) if self.autoencoder else samples


def draw_latents(moments: jax.Array, noise: jax.Array, latent_scale: float) -> jax.Array:
    """latents = latent_scale·(mean + exp(logvar / 2)·noise), logvar clipped to [-30, 20]; float32.

    moments [B, H, W, 2C] are mean and log-variance of the autoencoder's posterior; noise [B, H, W, C].
    """
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return latent_scale * (mean + jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR_RANGE)) * noise)
