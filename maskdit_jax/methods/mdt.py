"""MDT (arXiv 2303.14389) and MDTv2: a DiT that also learns to denoise what it does not see.

A training step is two passes over the same images and timesteps, one of all tokens and one with some hidden
from the encoder; each has its own noise and dropped labels, and is judged on all patches.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import jax
import numpy as np
from flax import nnx

from maskdit_jax.diffusion.ddpm import (
    alphas_cumprod,
    diffuse,
    linear_betas,
    min_snr_weight,
    noise_levels,
)
from maskdit_jax.diffusion.edm import Denoiser
from maskdit_jax.diffusion.guidance import drop_labels
from maskdit_jax.diffusion.learned_variance import noise_and_variance_loss, variance_denoiser
from maskdit_jax.diffusion.solvers import SamplerOptions
from maskdit_jax.errors import UserError
from maskdit_jax.methods.method import Method, Network, Shape, check_heads, check_patches, check_visible
from maskdit_jax.models import mdt
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.masking import TokenMask, count_kept, random_mask
from maskdit_jax.models.sizes import fill_size
from maskdit_jax.options import option

SCHEDULE, TIMESTEPS = "linear", 1000  # of DDPM, in every published network
RATIO_SEED = 2303_14389  # of the mask ratios of a run's steps


@dataclass(frozen=True)
class MDTNetwork:
    """What decides the parameters of an MDT."""

    version: int = option(1, "1: MDT; 2: MDTv2, with long skips", at_least=1, at_most=2)
    size: str = option("XL/2", "S, B, L or XL / patch size, for the four numbers below that are 0; or custom")
    hidden_size: int = option(0, "width; 0: from `size`", at_least=1, at_most=2**16)
    depth: int = option(0, "blocks in all; 0: from `size`", at_least=1, at_most=1_000)
    num_heads: int = option(0, "attention heads; 0: from `size`", at_least=1)
    patch_size: int = option(0, "latent pixels per side of a patch; 0: from `size`", at_least=1)
    decoder_depth: int = option(
        0, "those of the blocks that see all tokens; 0: 2, in version 2 4, or 6 of width 384", at_least=1
    )

    def __post_init__(self):
        fill_size(self, mdt.SIZES, mdt.PATCH_SIZES)
        if not self.decoder_depth:
            object.__setattr__(
                self, "decoder_depth", mdt.published_decoder_depth(self.version, self.hidden_size)
            )


class MDTDraws(NamedTuple):
    """clean [B, H, W, C], t [B] int; of the full and of the masked pass noise [B, H, W, C] and labels [B]
    (some dropped); mask of the masked one (None: nothing hidden)."""

    clean: jax.Array
    t: jax.Array
    noise_full: jax.Array
    noise_masked: jax.Array
    labels_full: jax.Array
    labels_masked: jax.Array
    mask: TokenMask | None


@dataclass(frozen=True)
class MDT(Method):
    """Masked latent training of both versions; the recipes have the options of each."""

    network: MDTNetwork = field(default_factory=MDTNetwork)
    label_dropout: float = option(0.1, "share of the labels replaced by no class", at_least=0, at_most=1)
    mask_ratio: float = option(0.3, "share of the patches hidden in the masked pass", at_least=0, at_most=1)
    mask_ratio_spread: float = option(
        0.0, "each step hides a share drawn between mask_ratio and so much more", at_least=0, at_most=1
    )
    min_snr: float = option(
        0.0, "weight of the noise's error is min(SNR, this) / SNR of the timestep; 0: 1", at_least=0
    )

    # Guidance of three channels that grows, as in the published samples.
    sampler: ClassVar[SamplerOptions] = SamplerOptions(
        solver="ancestral", grid="respaced", num_steps=250, cfg_scale=3.8, cfg_growth=4.0, guided_channels=3
    )

    def check(self, data: Shape) -> None:
        n = self.network
        tokens = check_patches(data, n.patch_size)
        check_heads(n, "num_heads", "hidden_size")
        rest = n.depth - n.decoder_depth
        if rest < n.version or (n.version == 2 and rest % 2):
            expected = "an even number of" if n.version == 2 else "some"
            raise UserError(
                f"method.network.decoder_depth={n.decoder_depth} of method.network.depth={n.depth} blocks: "
                f"version {n.version} needs {expected} others, for the encoder"
            )
        highest = self.mask_ratio + self.mask_ratio_spread
        name = "mask_ratio_spread" if self.mask_ratio_spread else "mask_ratio"
        if highest > 1:
            raise UserError(
                f"method.mask_ratio={self.mask_ratio} and method.mask_ratio_spread={self.mask_ratio_spread} "
                "make more than 1"
            )
        check_visible(count_kept(tokens, highest), tokens, name, highest)

    def build(self, data: Shape, compute: Compute, rngs: nnx.Rngs) -> mdt.MDT:
        options = vars(self.network) | data._asdict()
        del options["size"]
        return mdt.MDT(**options, compute=compute, rngs=rngs)

    def num_tokens(self, data: Shape) -> int:
        return (data.image_size // self.network.patch_size) ** 2

    def num_keep(self, data: Shape, step: int, num_steps: int) -> int:
        """The same in every step, or of a ratio drawn for it: in every run the same."""
        ratio = self.mask_ratio
        if self.mask_ratio_spread:
            ratio += self.mask_ratio_spread * np.random.default_rng([RATIO_SEED, step]).random()
        return count_kept(self.num_tokens(data), ratio)

    def num_keep_range(self, data: Shape, num_steps: int) -> tuple[int, int]:
        ratios = self.mask_ratio + self.mask_ratio_spread, self.mask_ratio
        low, high = (count_kept(self.num_tokens(data), ratio) for ratio in ratios)
        return low, high

    def draw(self, key: jax.Array, batch: dict[str, jax.Array], num_keep: int) -> MDTDraws:
        t_key, mask_key, *pass_keys = jax.random.split(key, 6)
        clean = batch["clean"]
        num_tokens, mask = (clean.shape[1] // self.network.patch_size) ** 2, None
        if num_keep < num_tokens:
            mask = random_mask(jax.random.uniform(mask_key, (len(clean), num_tokens)), num_keep)
        return MDTDraws(
            clean,
            t=jax.random.randint(t_key, (len(clean),), 0, TIMESTEPS),
            noise_full=jax.random.normal(pass_keys[0], clean.shape),
            noise_masked=jax.random.normal(pass_keys[1], clean.shape),
            labels_full=drop_labels(pass_keys[2], batch["labels"], self.label_dropout),
            labels_masked=drop_labels(pass_keys[3], batch["labels"], self.label_dropout),
            mask=mask,
        )

    def loss(self, network: Network, draws: MDTDraws) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The sum of both passes (sec. 3.2): squared error of the noise plus the bound of the variance."""
        clean, t, noise_full, noise_masked, labels_full, labels_masked, mask = draws
        alpha_bar, betas = alphas_cumprod(SCHEDULE, TIMESTEPS), linear_betas(TIMESTEPS)

        def terms(noise, labels, mask):
            prediction = network(diffuse(clean, noise, t, alpha_bar), t, labels, mask)
            denoise_loss, variance_loss = noise_and_variance_loss(prediction, clean, noise, t, betas)
            if self.min_snr:
                denoise_loss = denoise_loss * min_snr_weight(t, alpha_bar, self.min_snr)
            return denoise_loss, variance_loss

        full, masked = terms(noise_full, labels_full, None), terms(noise_masked, labels_masked, mask)
        names = ("denoise_loss", "variance_loss")
        reported = dict(zip(names, full)) | {f"masked_{name}": x for name, x in zip(names, masked)}
        return sum(full) + sum(masked), reported

    def denoiser(self, network: Network) -> Denoiser:
        return variance_denoiser(network, self.noise_levels())

    def noise_levels(self) -> np.ndarray:
        return noise_levels(SCHEDULE, TIMESTEPS)
