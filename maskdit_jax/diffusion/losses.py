"""The training loss of MaskDiT (arXiv 2306.09305, sec. 3.3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskdit_jax.diffusion.edm import Denoiser, draw_sigma, loss_weight, per_sample
from maskdit_jax.diffusion.guidance import NULL_LABEL
from maskdit_jax.models.embed import patchify
from maskdit_jax.models.masking import TokenMask, random_mask


class NoisyBatch(NamedTuple):
    """Everything random about one training step, drawn before any of it is computed with.

    latents and noisy [B, H, W, C], sigma [B], labels [B] (some dropped), mask (None: nothing hidden).
    """

    latents: jax.Array
    noisy: jax.Array
    sigma: jax.Array
    labels: jax.Array
    mask: TokenMask | None


def draw_noisy_batch(
    key: jax.Array,
    latents: jax.Array,
    labels: jax.Array,
    *,
    P_mean: float,
    P_std: float,
    label_dropout: float,
    num_tokens: int,
    num_keep: int,
) -> NoisyBatch:
    """Draw noise levels, noise, dropped labels and, if num_keep < num_tokens, masks."""
    sigma_key, noise_key, label_key, mask_key = jax.random.split(key, 4)
    batch_size = latents.shape[0]
    sigma = draw_sigma(sigma_key, batch_size, P_mean, P_std)
    noise = jax.random.normal(noise_key, latents.shape)
    # Here and nowhere else: dropped once more in the network, as some codes do, 19 % would be lost, not 10.
    dropped = jax.random.bernoulli(label_key, label_dropout, (batch_size,))
    mask = None
    if num_keep < num_tokens:
        mask = random_mask(jax.random.uniform(mask_key, (batch_size, num_tokens)), num_keep)
    return NoisyBatch(
        latents=latents,
        noisy=latents + per_sample(sigma) * noise,
        sigma=sigma,
        labels=jnp.where(dropped, NULL_LABEL, labels),
        mask=mask,
    )


def masked_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean over tokens of values [B, N] where weights [B, N] is 1, per sample [B]."""
    return (values * weights).sum(axis=1) / weights.sum(axis=1)


def maskdit_loss(
    denoise: Denoiser, batch: NoisyBatch, *, patch_size: int, sigma_data: float, mae_coef: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss per sample [B], and its two terms: denoising of visible patches, reconstruction of hidden ones.

    The reconstruction target is the noisy patch, standardised by its own mean and variance. With
    nothing hidden the loss is the plain weighted error; there, and with patches of one value, is no
    reconstruction term.
    """
    denoised = denoise(batch.noisy, batch.sigma, batch.labels, batch.mask)
    error = jnp.square(denoised - batch.latents)
    weighted = patchify(per_sample(loss_weight(batch.sigma, sigma_data)) * error, patch_size)
    per_patch = weighted.mean(axis=-1)  # [B, N]
    if batch.mask is None:
        denoise_loss = per_patch.mean(axis=1)
        return denoise_loss, {"denoise_loss": denoise_loss}

    hidden = batch.mask.hidden
    denoise_loss = masked_mean(per_patch, 1 - hidden)
    noisy = patchify(batch.noisy, patch_size)
    if noisy.shape[-1] == 1:  # one value has no variance to be standardised by
        return denoise_loss, {"denoise_loss": denoise_loss}
    # n - 1 and 1e-6 as in MAE, whose reconstruction target this is; a flat patch has no variance at all.
    variance = noisy.var(axis=-1, ddof=1, keepdims=True)
    target = (noisy - noisy.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(variance + 1e-6)
    reconstruction = jnp.square(patchify(denoised, patch_size) - target).mean(axis=-1)
    mae_loss = masked_mean(reconstruction, hidden)
    loss = denoise_loss + mae_coef * mae_loss
    return loss, {"denoise_loss": denoise_loss, "mae_loss": mae_loss}
