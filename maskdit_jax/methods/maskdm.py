"""MaskDM (arXiv 2306.11363): a U-ViT that predicts DDPM's noise, on the visible patches of a masked image.

Masked pre-training, and with mask_type none the training from its weights that follows.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskdit_jax.diffusion.ddpm import (
    NOISE_SCHEDULES,
    alphas_cumprod,
    diffuse,
    epsilon_denoiser,
    noise_levels,
)
from maskdit_jax.diffusion.edm import Denoiser
from maskdit_jax.diffusion.guidance import drop_labels
from maskdit_jax.diffusion.solvers import SamplerOptions
from maskdit_jax.errors import UserError
from maskdit_jax.methods.method import Method, Network, Shape, check_heads, check_patches, check_visible
from maskdit_jax.models import uvit
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.embed import patchify
from maskdit_jax.models.masking import (
    MASK_TYPES,
    TokenMask,
    block_mask,
    count_visible_patches,
    crop_mask,
    keep_tokens,
    random_mask,
)
from maskdit_jax.models.sizes import fill_size
from maskdit_jax.options import option


@dataclass(frozen=True)
class UViTNetwork:
    """What decides the parameters of a U-ViT."""

    size: str = option("B/4", "S or B / patch size, for the four numbers below that are 0; or custom")
    hidden_size: int = option(0, "width; 0: from `size`", at_least=1, at_most=2**16)
    depth: int = option(
        0, "⌊depth/2⌋ blocks, one, ⌊depth/2⌋ blocks; 0: from `size`", at_least=2, at_most=1_000
    )
    num_heads: int = option(0, "attention heads; 0: from `size`", at_least=1)
    patch_size: int = option(0, "pixels per side of a patch; 0: from `size`", at_least=1)
    mlp_ratio: float = option(4.0, "width of the MLPs' middle, in widths", above=0, at_most=64)
    qkv_bias: bool = option(False, "a learned bias of queries and values")
    time_mlp: bool = option(False, "the sinusoid of the timestep passes an MLP")

    def __post_init__(self):
        fill_size(self, uvit.SIZES, uvit.PATCH_SIZES)


class MaskDMDraws(NamedTuple):
    """noisy x_t and noise [B, H, W, C], t [B] int, labels [B] (some dropped), mask (None: nothing hidden)."""

    noisy: jax.Array
    noise: jax.Array
    t: jax.Array
    labels: jax.Array
    mask: TokenMask | None


@dataclass(frozen=True)
class MaskDM(Method):
    """Masked pre-training, and with mask_type none the fine-tuning after it."""

    network: UViTNetwork = field(default_factory=UViTNetwork)
    noise_schedule: str = option("cosine", "of DDPM: cosine or linear", choices=tuple(NOISE_SCHEDULES))
    timesteps: int = option(1000, "T, noise levels of training", at_least=2, at_most=10_000)
    mask_type: str = option(
        "block", "what is hidden: none, patch (any), block (whole blocks) or crop (all but a window)",
        choices=MASK_TYPES,
    )  # fmt: skip
    mask_ratio: float = option(0.9, "share of the patches hidden, of patch and block", at_least=0, at_most=1)
    block_size: int = option(4, "patches per side of a block", at_least=1)
    crop_size: int = option(11, "patches per side of the visible window", at_least=1)
    label_dropout: float = option(0.1, "share of the labels replaced by no class", at_least=0, at_most=1)

    sampler: ClassVar[SamplerOptions] = SamplerOptions(
        solver="ddim", grid="timesteps", num_steps=250, eta=1.0, clip=True, cfg_scale=1.0
    )

    def check(self, data: Shape) -> None:
        patches = check_patches(data, self.network.patch_size)
        grid = self._grid(data.image_size)
        check_heads(self.network, "num_heads", "hidden_size")
        if not np.isfinite(self.noise_levels()).all():
            raise UserError(
                f"method.timesteps={self.timesteps}: the linear schedule leaves nothing of the data at the "
                "end; use at least 21, or method.noise_schedule=cosine"
            )
        if self.mask_type == "block" and grid % self.block_size:
            raise UserError(
                f"method.block_size={self.block_size} does not divide the {grid}×{grid} patches of an image"
            )
        if self.mask_type == "crop" and self.crop_size > grid:
            raise UserError(
                f"method.crop_size={self.crop_size} must be at most {grid}: an image is {grid}×{grid} patches"
            )
        check_visible(self._count_visible(grid), patches, "mask_ratio", self.mask_ratio)

    def build(self, data: Shape, compute: Compute, rngs: nnx.Rngs) -> uvit.UViT:
        options = vars(self.network) | data._asdict()
        del options["size"]
        return uvit.UViT(**options, compute=compute, rngs=rngs)

    def num_tokens(self, data: Shape) -> int:
        return self._grid(data.image_size) ** 2

    def num_keep(self, data: Shape, step: int, num_steps: int) -> int:
        """The same in every step."""
        return self._count_visible(self._grid(data.image_size))

    def draw(self, key: jax.Array, batch: dict[str, jax.Array], num_keep: int) -> MaskDMDraws:
        t_key, noise_key, label_key, mask_key = jax.random.split(key, 4)
        clean = batch["clean"]
        t = jax.random.randint(t_key, (len(clean),), 0, self.timesteps)
        noise = jax.random.normal(noise_key, clean.shape)
        noisy = diffuse(clean, noise, t, alphas_cumprod(self.noise_schedule, self.timesteps))
        labels = drop_labels(label_key, batch["labels"], self.label_dropout)
        return MaskDMDraws(noisy, noise, t, labels, self._draw_mask(mask_key, clean.shape, num_keep))

    def loss(self, network: Network, draws: MaskDMDraws) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Squared error of the noise, mean over the visible patches (DDPM, eq. 14)."""
        noisy, noise, t, labels, mask = draws
        predicted = network(noisy, t, labels, mask)
        if mask is not None:
            noise = keep_tokens(patchify(noise, self.network.patch_size), mask)
        denoise_loss = jnp.square(predicted - noise).reshape(len(t), -1).mean(axis=1)
        return denoise_loss, {"denoise_loss": denoise_loss}

    def denoiser(self, network: Network) -> Denoiser:
        return epsilon_denoiser(network, self.noise_levels())

    def noise_levels(self) -> np.ndarray:
        return noise_levels(self.noise_schedule, self.timesteps)

    def _grid(self, image_size: int) -> int:
        return image_size // self.network.patch_size

    def _count_visible(self, grid: int) -> int:
        return count_visible_patches(
            self.mask_type,
            grid,
            ratio=self.mask_ratio,
            block_size=self.block_size,
            crop_size=self.crop_size,
        )

    def _draw_mask(self, key: jax.Array, image_shape: tuple[int, ...], num_keep: int) -> TokenMask | None:
        batch_size, grid = image_shape[0], self._grid(image_shape[1])
        if num_keep == grid**2:
            return None
        if self.mask_type == "crop":
            corners = jax.random.randint(key, (batch_size, 2), 0, grid - self.crop_size + 1)
            return crop_mask(corners, grid, self.crop_size)
        if self.mask_type == "block":
            uniform = jax.random.uniform(key, (batch_size, (grid // self.block_size) ** 2))
            return block_mask(uniform, grid, self.block_size, num_keep)
        return random_mask(jax.random.uniform(key, (batch_size, grid**2)), num_keep)
