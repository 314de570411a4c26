"""MaskDM's network (arXiv 2306.11363): a U-ViT (arXiv 2209.12152), a transformer with long skips.

Noise level and class are tokens beside the patches; hidden patches are left out, nothing stands for them.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maskdit_jax.models.blocks import MLP, Attention, BlockStack, exact_gelu
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.embed import (
    LabelToken,
    Linear,
    NoiseEmbedding,
    PositionTable,
    noise_features,
    patchify,
    truncated_normal,
    unpatchify,
)
from maskdit_jax.models.masking import TokenMask, keep_tokens

# (depth, hidden_size, num_heads); a size is written NAME/PATCH, for example "B/4".
SIZES = {"S": (13, 512, 8), "B": (12, 768, 12)}
PATCH_SIZES = (4,)
NORM_EPS = 1e-5


def layer_norm(width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LN(x)·scale + bias; the arithmetic is float32."""
    return nnx.LayerNorm(width, epsilon=NORM_EPS, use_fast_variance=False, dtype=dtype, rngs=rngs)


class PlainBlock(nnx.Module):
    """Pre-norm transformer block without modulation, [B, N, D] → [B, N, D]."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        qkv_bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layer_norm(width, dtype=dtype, rngs=rngs)
        self.attention = Attention(
            width,
            num_heads,
            qkv_bias="qv" if qkv_bias else "none",
            kernel_init=truncated_normal,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = layer_norm(width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(
            width,
            ratio=mlp_ratio,
            activation=exact_gelu,
            kernel_init=truncated_normal,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = checkpoint_name(x + self.attention(self.norm1(x)), "residual")
        return x + self.mlp(self.norm2(x))


class SkipBlock(PlainBlock):
    """A block behind a long skip: x and an earlier block's output, [B, N, D] each, through Linear 2D → D."""

    def __init__(self, width: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, **options):
        super().__init__(width, num_heads, dtype=dtype, rngs=rngs, **options)
        self.skip = Linear(2 * width, width, kernel_init=truncated_normal, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, earlier: jax.Array) -> jax.Array:  # type: ignore[override] # one more
        joined = self.skip(jnp.concatenate([x, earlier], axis=-1))
        return super().__call__(checkpoint_name(joined, "residual"))


class UViT(nnx.Module):
    """The network eps(x, t, labels, mask); every argument is a number, so any size can be built.

    ⌊depth/2⌋ blocks, one in the middle and ⌊depth/2⌋ more, each of which gets the output of its mirror image
    among the first. num_classes 0 is an unconditional network. qkv_bias: queries and values have a learned
    bias. time_mlp: the sinusoid of t passes an MLP D → 4D → D before it is a token.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        mlp_ratio: float = 4,
        qkv_bias: bool = False,
        time_mlp: bool = False,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.matmul_precision = compute.matmul_precision
        self.dtype = dtype = compute.dtype
        self.patch_size, self.hidden_size = patch_size, hidden_size
        num_tokens, patch_values = (image_size // patch_size) ** 2, patch_size**2 * channels
        linear = functools.partial(Linear, kernel_init=truncated_normal, dtype=dtype, rngs=rngs)

        def blocks(kind, depth):
            def block(rngs):
                options = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias}
                return kind(hidden_size, num_heads, **options, dtype=dtype, rngs=rngs)

            return BlockStack(block, depth, compute=compute, rngs=rngs)

        self.patch_embedding = linear(patch_values, hidden_size)
        self.positions = PositionTable(truncated_normal(rngs.params(), (num_tokens, hidden_size)))
        self.time_embedding = nnx.data(None)
        if time_mlp:
            self.time_embedding = NoiseEmbedding(
                hidden_size,
                num_features=hidden_size,
                inner_size=4 * hidden_size,
                kernel_init=truncated_normal,
                dtype=dtype,
                rngs=rngs,
            )
        self.time_position = nnx.Param(truncated_normal(rngs.params(), (hidden_size,)))
        self.label_embedding = nnx.data(None)
        if num_classes:
            self.label_embedding = LabelToken(num_classes, hidden_size, rngs=rngs)
        self.in_blocks = blocks(PlainBlock, depth // 2)
        self.middle = blocks(PlainBlock, 1)
        self.out_blocks = blocks(SkipBlock, depth // 2)
        self.norm = layer_norm(hidden_size, dtype=dtype, rngs=rngs)
        self.output = linear(hidden_size, patch_values)

    def __call__(
        self, x: jax.Array, t: jax.Array, labels: jax.Array, mask: TokenMask | None = None
    ) -> jax.Array:
        """eps for x [B, H, W, C], timesteps t [B], labels [B] int (-1 = no class), in float32.

        Without a mask it is an image [B, H, W, C]; with one its K visible patches [B, K, p·p·C], in the
        order of the mask: of the others the network knows nothing.
        """
        with jax.default_matmul_precision(self.matmul_precision):
            tokens = self.encode(x, t, labels, mask)
            patches = self.output(tokens[:, -self.num_patches(mask) :]).astype(jnp.float32)  # [B, K, p·p·C]
        return unpatchify(patches, self.patch_size) if mask is None else patches

    def num_patches(self, mask: TokenMask | None) -> int:
        """K, or N where nothing is hidden."""
        return len(self.positions.table) if mask is None else mask.keep_ids.shape[1]

    def encode(self, x: jax.Array, t: jax.Array, labels: jax.Array, mask: TokenMask | None) -> jax.Array:
        """Tokens [B, E + K, D] after the last norm: label (if there are classes), time, visible patches."""
        x = self.embed(x, t, labels, mask)
        x, skips = self.in_blocks(x, emit=True)
        x = self.out_blocks(self.middle(x), own=skips[::-1])
        return self.norm(x)

    def embed(self, x: jax.Array, t: jax.Array, labels: jax.Array, mask: TokenMask | None) -> jax.Array:
        """The tokens [B, E + K, D] in front of the blocks, with their positions."""
        patches = self.patch_embedding(keep_tokens(patchify(x, self.patch_size), mask))
        extra = [self.embed_time(t)]
        if self.label_embedding is not None:
            extra.insert(0, self.label_embedding(labels))
        return jnp.concatenate(
            [*(token[:, None].astype(self.dtype) for token in extra), self.positions(patches, mask)], axis=1
        )

    def embed_time(self, t: jax.Array) -> jax.Array:
        """Time token [B, D]."""
        if self.time_embedding is None:
            features = noise_features(t, self.hidden_size)
        else:
            features = self.time_embedding(t)
        return features + self.time_position[...][None]
