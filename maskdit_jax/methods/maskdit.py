"""MaskDiT (arXiv 2306.09305): half of the patches hidden from the encoder, EDM's noise, two losses."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maskdit_jax.diffusion.edm import Denoiser, draw_sigma, loss_weight, per_sample, precondition
from maskdit_jax.diffusion.guidance import drop_labels
from maskdit_jax.diffusion.solvers import SamplerOptions
from maskdit_jax.errors import UserError
from maskdit_jax.methods.method import Method, Network, Shape, check_heads, check_patches, check_visible
from maskdit_jax.models import maskdit
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.embed import patchify
from maskdit_jax.models.masking import TokenMask, count_kept, random_mask
from maskdit_jax.models.sizes import fill_size
from maskdit_jax.options import option

MASK_SCHEDULES = ("constant", "linear", "exp", *(f"cosine{n}" for n in range(2, 7)))


@dataclass(frozen=True)
class MaskDiTNetwork:
    """What decides the parameters of a MaskDiT."""

    size: str = option(
        "XL/2", "S, B, L, XL or H / patch size, for the four numbers below that are 0; or custom"
    )
    hidden_size: int = option(0, "width of the encoder; 0: from `size`", at_least=1, at_most=2**16)
    depth: int = option(0, "blocks of the encoder; 0: from `size`", at_least=1, at_most=1_000)
    num_heads: int = option(0, "attention heads of the encoder; 0: from `size`", at_least=1)
    patch_size: int = option(0, "latent pixels per side of a patch; 0: from `size`", at_least=1)
    use_decoder: bool = option(True, "false: a plain DiT, which has no reconstruction")
    mask_token: bool = option(True, "a learned vector stands where patches are hidden; false: zeros")
    decoder_hidden_size: int = option(512, "width of the decoder", at_least=1, at_most=2**16)
    decoder_depth: int = option(8, "blocks of the decoder", at_least=1, at_most=1_000)
    decoder_num_heads: int = option(16, "attention heads of the decoder", at_least=1)

    def __post_init__(self):
        fill_size(self, maskdit.SIZES, maskdit.PATCH_SIZES)
        if not self.use_decoder:  # nothing stands where patches are hidden
            object.__setattr__(self, "mask_token", False)


class MaskDiTDraws(NamedTuple):
    """clean and noisy [B, H, W, C], sigma [B], labels [B] (some dropped), mask (None: nothing hidden)."""

    clean: jax.Array
    noisy: jax.Array
    sigma: jax.Array
    labels: jax.Array
    mask: TokenMask | None


@dataclass(frozen=True)
class MaskDiT(Method):
    """Masked training, and with mask_ratio 0 the unmasked tuning after it."""

    network: MaskDiTNetwork = field(default_factory=MaskDiTNetwork)
    sigma_data: float = option(
        0.5, "standard deviation of the data that the preconditioning assumes", above=0
    )
    P_mean: float = option(-1.2, "mean of ln(sigma) in training")
    P_std: float = option(1.2, "standard deviation of ln(sigma) in training", above=0)
    mae_coef: float = option(0.1, "weight of the reconstruction of hidden patches", at_least=0)
    label_dropout: float = option(0.1, "share of the labels replaced by no class", at_least=0, at_most=1)
    mask_ratio: float = option(
        0.5, "share of the patches hidden at the start of training", at_least=0, at_most=1
    )
    mask_ratio_min: float = option(
        0.0, "the other end of a schedule that is not constant", at_least=0, at_most=1
    )
    mask_schedule: str = option(
        "constant", "constant, linear, exp or cosine2 … cosine6", choices=MASK_SCHEDULES
    )
    mask_schedule_steps: int = option(
        0, "updates from one end of the schedule to the other; 0: the run's", at_least=0
    )

    sampler: ClassVar[SamplerOptions] = SamplerOptions()

    def check(self, data: Shape) -> None:
        n = self.network
        tokens = check_patches(data, n.patch_size)
        check_heads(n, "num_heads", "hidden_size")
        if n.use_decoder:
            check_heads(n, "decoder_num_heads", "decoder_hidden_size")
        elif self.mae_coef:
            raise UserError(
                f"method.mae_coef={self.mae_coef} needs a decoder; set it to 0 with "
                "method.network.use_decoder=false"
            )
        if self.mae_coef and n.patch_size**2 * data.channels == 1:
            raise UserError(
                f"method.mae_coef={self.mae_coef}: a patch of one value (method.network.patch_size=1, "
                "data.channels=1) has no variance to be reconstructed by; use method.mae_coef=0 or a larger "
                "patch"
            )
        for name in ("mask_ratio", "mask_ratio_min")[: 1 if self.mask_schedule == "constant" else 2]:
            check_visible(count_kept(tokens, getattr(self, name)), tokens, name, getattr(self, name))

    def build(self, data: Shape, compute: Compute, rngs: nnx.Rngs) -> maskdit.MaskDiT:
        options = vars(self.network) | data._asdict()
        del options["size"]
        return maskdit.MaskDiT(**options, compute=compute, rngs=rngs)

    def num_tokens(self, data: Shape) -> int:
        return (data.image_size // self.network.patch_size) ** 2

    def num_keep(self, data: Shape, step: int, num_steps: int) -> int:
        """The schedule runs its course over mask_schedule_steps; a shorter run ends within it."""
        progress = min(step / max((self.mask_schedule_steps or num_steps) - 1, 1), 1.0)
        ratio = mask_ratio_at(progress, self.mask_schedule, self.mask_ratio, self.mask_ratio_min)
        return count_kept(self.num_tokens(data), ratio)

    def draw(self, key: jax.Array, batch: dict[str, jax.Array], num_keep: int) -> MaskDiTDraws:
        sigma_key, noise_key, label_key, mask_key = jax.random.split(key, 4)
        clean = batch["clean"]
        batch_size = len(clean)
        sigma = draw_sigma(sigma_key, batch_size, self.P_mean, self.P_std)
        noise = jax.random.normal(noise_key, clean.shape)
        labels = drop_labels(label_key, batch["labels"], self.label_dropout)
        num_tokens, mask = (clean.shape[1] // self.network.patch_size) ** 2, None
        if num_keep < num_tokens:
            mask = random_mask(jax.random.uniform(mask_key, (batch_size, num_tokens)), num_keep)
        return MaskDiTDraws(clean, clean + per_sample(sigma) * noise, sigma, labels, mask)

    def loss(self, network: Network, draws: MaskDiTDraws) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Denoising of the visible patches, mae_coef times reconstruction of the hidden ones (sec. 3.3).

        The reconstruction target is the noisy patch, standardised by its own mean and variance. With
        nothing hidden the loss is the plain weighted error, and there is no reconstruction.
        """
        clean, noisy, sigma, labels, mask = draws
        patch_size = self.network.patch_size
        denoised = precondition(network, self.sigma_data)(noisy, sigma, labels, mask)
        weighted = per_sample(loss_weight(sigma, self.sigma_data)) * jnp.square(denoised - clean)
        per_patch = patchify(weighted, patch_size).mean(axis=-1)  # [B, N]
        if mask is None:
            denoise_loss = per_patch.mean(axis=1)
            return denoise_loss, {"denoise_loss": denoise_loss}

        denoise_loss = masked_mean(per_patch, 1 - mask.hidden)
        if not self.mae_coef:
            return denoise_loss, {"denoise_loss": denoise_loss}
        patches = patchify(noisy, patch_size)
        # n - 1 and 1e-6 as in MAE, whose reconstruction target this is; a flat patch has no variance at all.
        variance = patches.var(axis=-1, ddof=1, keepdims=True)
        target = (patches - patches.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(variance + 1e-6)
        reconstruction = jnp.square(patchify(denoised, patch_size) - target).mean(axis=-1)
        mae_loss = masked_mean(reconstruction, mask.hidden)
        loss = denoise_loss + self.mae_coef * mae_loss
        return loss, {"denoise_loss": denoise_loss, "mae_loss": mae_loss}

    def denoiser(self, network: Network) -> Denoiser:
        return precondition(network, self.sigma_data)

    def data_std(self) -> float:
        return self.sigma_data


def masked_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean over tokens of values [B, N] where weights [B, N] is 1, per sample [B]."""
    return (values * weights).sum(axis=1) / weights.sum(axis=1)


def mask_ratio_at(progress: float, schedule: str, ratio: float, ratio_min: float) -> float:
    """Mask ratio at progress 0 … 1 (METHOD of MaskDiT's tuning stage, sec. 4).

    `constant` ignores `ratio_min`; `linear` rises from it to `ratio`; the others fall from `ratio`:
    cosineN = (ratio - ratio_min)·cosᴺ(π·progress / 2) + ratio_min, exp = (…)·exp(-7·progress) + ratio_min.
    """
    if schedule == "constant":
        return ratio
    if schedule == "linear":
        shape = progress
    elif schedule == "exp":
        shape = math.exp(-7 * progress)
    else:
        shape = math.cos(math.pi * progress / 2) ** int(schedule.removeprefix("cosine"))
    return (ratio - ratio_min) * shape + ratio_min
