"""The Stable Diffusion autoencoder (KL-f8; Rombach et al., arXiv 2112.10752): images ↔ latents.

Modules are named as in diffusers' AutoencoderKL, the layout its weights are published in.
"""

from collections.abc import Sequence

import jax
from flax import nnx

from maskdit_jax.models.blocks import attend

NORM_EPS = 1e-6


class AutoencoderKL(nnx.Module):
    """Encoder to the moments of a posterior over latents, and decoder.

    The defaults are the published autoencoder's; the latents are 2^(levels - 1) times smaller than
    the image. All arithmetic is float32, its products at `matmul_precision`.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        matmul_precision: str = "highest",
        rngs: nnx.Rngs,
    ):
        self.matmul_precision = matmul_precision
        widths, depth, groups = tuple(block_out_channels), layers_per_block, norm_num_groups
        moments = 2 * latent_channels
        self.encoder = Encoder(image_channels, widths, depth, moments, groups, rngs=rngs)
        self.quant_conv = conv(moments, moments, 1, rngs)
        self.post_quant_conv = conv(latent_channels, latent_channels, 1, rngs)
        self.decoder = Decoder(latent_channels, widths, depth + 1, image_channels, groups, rngs=rngs)

    def encode(self, images: jax.Array) -> jax.Array:
        """Moments [B, H/f, W/f, 2C] (mean, log-variance), not scaled, of images [B, H, W, 3] in [-1, 1]."""
        with jax.default_matmul_precision(self.matmul_precision):
            return self.quant_conv(self.encoder(images))

    def decode(self, raw_latents: jax.Array) -> jax.Array:
        """Images [B, H, W, 3], about [-1, 1], of raw (not scaled) latents [B, H/f, W/f, C]."""
        with jax.default_matmul_precision(self.matmul_precision):
            return self.decoder(self.post_quant_conv(raw_latents))


class Encoder(nnx.Module):
    """Images [B, H, W, 3] → features [B, H/f, W/f, out_channels]."""

    def __init__(self, channels, widths, depth, out_channels, groups, *, rngs: nnx.Rngs):
        self.conv_in = conv(channels, widths[0], 3, rngs)
        levels, before = [], widths[0]
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            levels.append(DownBlock(before, width, depth, groups, downsample=not last, rngs=rngs))
            before = width
        self.down_blocks = nnx.List(levels)
        self.mid_block = MidBlock(before, groups, rngs=rngs)
        self.conv_norm_out = norm(before, groups, rngs)
        self.conv_out = conv(before, out_channels, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents [B, H/f, W/f, C] → images [B, H, W, out_channels]."""

    def __init__(self, channels, widths, depth, out_channels, groups, *, rngs: nnx.Rngs):
        before = widths[-1]
        self.conv_in = conv(channels, before, 3, rngs)
        self.mid_block = MidBlock(before, groups, rngs=rngs)
        levels = []
        for i, width in enumerate(reversed(widths)):
            last = i == len(widths) - 1
            levels.append(UpBlock(before, width, depth, groups, upsample=not last, rngs=rngs))
            before = width
        self.up_blocks = nnx.List(levels)
        self.conv_norm_out = norm(before, groups, rngs)
        self.conv_out = conv(before, out_channels, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class DownBlock(nnx.Module):
    """`depth` residual blocks, then half the resolution."""

    def __init__(self, in_channels, width, depth, groups, *, downsample: bool, rngs: nnx.Rngs):
        self.resnets = resnets(in_channels, width, depth, groups, rngs)
        self.downsamplers = nnx.List([Downsample(width, rngs=rngs)] if downsample else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in [*self.resnets, *self.downsamplers]:
            x = block(x)
        return x


class UpBlock(nnx.Module):
    """`depth` residual blocks, then twice the resolution."""

    def __init__(self, in_channels, width, depth, groups, *, upsample: bool, rngs: nnx.Rngs):
        self.resnets = resnets(in_channels, width, depth, groups, rngs)
        self.upsamplers = nnx.List([Upsample(width, rngs=rngs)] if upsample else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in [*self.resnets, *self.upsamplers]:
            x = block(x)
        return x


class MidBlock(nnx.Module):
    """Residual block, attention over all positions, residual block."""

    def __init__(self, width, groups, *, rngs: nnx.Rngs):
        self.resnets = resnets(width, width, 2, groups, rngs)
        self.attentions = nnx.List([Attention(width, groups, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class ResnetBlock(nnx.Module):
    """x + conv(SiLU(GN(conv(SiLU(GN(x)))))), x through a 1×1 convolution where the width changes."""

    def __init__(self, in_channels, width, groups, *, rngs: nnx.Rngs):
        self.norm1 = norm(in_channels, groups, rngs)
        self.conv1 = conv(in_channels, width, 3, rngs)
        self.norm2 = norm(width, groups, rngs)
        self.conv2 = conv(width, width, 3, rngs)
        self.conv_shortcut = nnx.data(conv(in_channels, width, 1, rngs) if in_channels != width else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class Attention(nnx.Module):
    """x + single-head self-attention over the positions of GN(x)."""

    def __init__(self, width, groups, *, rngs: nnx.Rngs):
        self.group_norm = norm(width, groups, rngs)
        self.to_q = nnx.Linear(width, width, rngs=rngs)
        self.to_k = nnx.Linear(width, width, rngs=rngs)
        self.to_v = nnx.Linear(width, width, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(width, width, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        tokens = self.group_norm(x).reshape(batch, height * width, 1, channels)  # one head
        out = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out).reshape(x.shape)


class Downsample(nnx.Module):
    """Convolution of stride 2; what it lacks at the border is added below and on the right."""

    def __init__(self, width, *, rngs: nnx.Rngs):
        self.conv = conv(width, width, 3, rngs, strides=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Each pixel twice in both directions, then a convolution."""

    def __init__(self, width, *, rngs: nnx.Rngs):
        self.conv = conv(width, width, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


def conv(in_channels: int, out_channels: int, size: int, rngs: nnx.Rngs, **options) -> nnx.Conv:
    """Convolution size×size over [B, H, W, C]."""
    return nnx.Conv(in_channels, out_channels, (size, size), rngs=rngs, **options)


def norm(channels: int, groups: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group norm whose variance is computed from centred values: E[x²] - E[x]² loses digits."""
    return nnx.GroupNorm(channels, groups, epsilon=NORM_EPS, use_fast_variance=False, rngs=rngs)


def resnets(in_channels: int, width: int, depth: int, groups: int, rngs: nnx.Rngs) -> nnx.List:
    """`depth` residual blocks; the first changes the width."""
    return nnx.List(
        [ResnetBlock(in_channels if i == 0 else width, width, groups, rngs=rngs) for i in range(depth)]
    )
