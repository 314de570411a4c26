"""DiT (arXiv 2212.09748): a transformer of all patches predicts DDPM's noise and its steps' variance."""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import jax
import numpy as np
from flax import nnx

from maskdit_jax.diffusion.ddpm import alphas_cumprod, diffuse, linear_betas, noise_levels
from maskdit_jax.diffusion.edm import Denoiser
from maskdit_jax.diffusion.guidance import drop_labels
from maskdit_jax.diffusion.learned_variance import noise_and_variance_loss, variance_denoiser
from maskdit_jax.diffusion.solvers import SamplerOptions
from maskdit_jax.methods.method import Method, Network, Shape, check_heads, check_patches
from maskdit_jax.models import dit
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.maskdit import PATCH_SIZES, SIZES
from maskdit_jax.models.sizes import fill_size
from maskdit_jax.options import option

SCHEDULE, TIMESTEPS = "linear", 1000  # of DDPM, in every published network


@dataclass(frozen=True)
class DiTNetwork:
    """What decides the parameters of a DiT."""

    size: str = option(
        "XL/2", "S, B, L, XL or H / patch size, for the four numbers below that are 0; or custom"
    )
    hidden_size: int = option(0, "width; 0: from `size`", at_least=1, at_most=2**16)
    depth: int = option(0, "blocks; 0: from `size`", at_least=1, at_most=1_000)
    num_heads: int = option(0, "attention heads; 0: from `size`", at_least=1)
    patch_size: int = option(0, "latent pixels per side of a patch; 0: from `size`", at_least=1)

    def __post_init__(self):
        fill_size(self, SIZES, PATCH_SIZES)


class DiTDraws(NamedTuple):
    """clean and noise [B, H, W, C], t [B] int, labels [B] (some dropped)."""

    clean: jax.Array
    noise: jax.Array
    t: jax.Array
    labels: jax.Array


@dataclass(frozen=True)
class DiT(Method):
    """Training on whole images, with a learned variance."""

    network: DiTNetwork = field(default_factory=DiTNetwork)
    label_dropout: float = option(0.1, "share of the labels replaced by no class", at_least=0, at_most=1)

    # Guidance of three channels, as in the published samples: the fourth of their latents has none.
    sampler: ClassVar[SamplerOptions] = SamplerOptions(
        solver="ancestral", grid="respaced", num_steps=250, guided_channels=3
    )

    def check(self, data: Shape) -> None:
        check_patches(data, self.network.patch_size)
        check_heads(self.network, "num_heads", "hidden_size")

    def build(self, data: Shape, compute: Compute, rngs: nnx.Rngs) -> dit.DiT:
        options = vars(self.network) | data._asdict()
        del options["size"]
        return dit.DiT(**options, compute=compute, rngs=rngs)

    def num_tokens(self, data: Shape) -> int:
        return (data.image_size // self.network.patch_size) ** 2

    def draw(self, key: jax.Array, batch: dict[str, jax.Array], num_keep: int) -> DiTDraws:
        t_key, noise_key, label_key = jax.random.split(key, 3)
        clean = batch["clean"]
        t = jax.random.randint(t_key, (len(clean),), 0, TIMESTEPS)
        noise = jax.random.normal(noise_key, clean.shape)
        return DiTDraws(clean, noise, t, drop_labels(label_key, batch["labels"], self.label_dropout))

    def loss(self, network: Network, draws: DiTDraws) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Squared error of the noise plus the bound that teaches the variance (sec. 3.1)."""
        clean, noise, t, labels = draws
        prediction = network(diffuse(clean, noise, t, alphas_cumprod(SCHEDULE, TIMESTEPS)), t, labels)
        denoise_loss, variance_loss = noise_and_variance_loss(
            prediction, clean, noise, t, linear_betas(TIMESTEPS)
        )
        return denoise_loss + variance_loss, {"denoise_loss": denoise_loss, "variance_loss": variance_loss}

    def denoiser(self, network: Network) -> Denoiser:
        return variance_denoiser(network, self.noise_levels())

    def noise_levels(self) -> np.ndarray:
        return noise_levels(SCHEDULE, TIMESTEPS)
