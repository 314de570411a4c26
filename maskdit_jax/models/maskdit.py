"""MaskDiT's network F (arXiv 2306.09305, sec. 3): an encoder of the visible tokens, a light decoder of all.

Without decoder it is a plain DiT.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from maskdit_jax.models.blocks import Block, BlockStack, ModulatedLinear
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.embed import (
    LabelEmbedding,
    Linear,
    NoiseEmbedding,
    patchify,
    position_table,
    unpatchify,
)
from maskdit_jax.models.masking import TokenMask, keep_tokens, restore_tokens

# (depth, hidden_size, num_heads); a size is written NAME/PATCH, for example "XL/2".
SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "H": (32, 1280, 16),
}
PATCH_SIZES = (2, 4, 8)


class MaskDiT(nnx.Module):
    """The network F(x, c_noise, labels, mask); every argument is a number, so any size can be built.

    num_classes 0 is an unconditional network. Without `mask_token` (as networks trained without the
    reconstruction loss were published) zeros fill the holes in front of the decoder; without
    `use_decoder` F is 0 at hidden tokens.
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
        use_decoder: bool = True,
        mask_token: bool = True,
        decoder_hidden_size: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.matmul_precision = compute.matmul_precision
        self.dtype = dtype = compute.dtype
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.hidden_size = hidden_size
        self.use_decoder = use_decoder
        patch_values = patch_size**2 * channels

        def blocks(depth, width, heads):
            def block(rngs):
                return Block(width, heads, hidden_size, dtype=dtype, rngs=rngs)

            return BlockStack(block, depth, compute=compute, rngs=rngs)

        self.patch_embedding = Linear(patch_values, hidden_size, dtype=dtype, rngs=rngs)
        self.noise_embedding = NoiseEmbedding(hidden_size, dtype=dtype, rngs=rngs)
        self.label_embedding = nnx.data(None)
        if num_classes:
            self.label_embedding = LabelEmbedding(num_classes, hidden_size, dtype=dtype, rngs=rngs)
        self.encoder = blocks(depth, hidden_size, num_heads)
        width = decoder_hidden_size if use_decoder else hidden_size
        self.mask_token = nnx.data(None)
        if use_decoder:
            self.bridge = ModulatedLinear(hidden_size, hidden_size, width, dtype=dtype, rngs=rngs)
            if mask_token:
                self.mask_token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (width,)))
            self.decoder = blocks(decoder_depth, width, decoder_num_heads)
        self.output = ModulatedLinear(width, hidden_size, patch_values, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, c_noise: jax.Array, labels: jax.Array, mask: TokenMask | None = None
    ) -> jax.Array:
        """F for x [B, H, W, C], c_noise [B], labels [B] int (-1 = no class) → [B, H, W, C] float32.

        With a mask the encoder sees its K visible tokens only.
        """
        with jax.default_matmul_precision(self.matmul_precision):
            c = self.condition(c_noise, labels)  # [B, D]
            tokens = self.encoder(self.embed(x, mask), c)  # [B, K, D]
            if self.use_decoder:
                tokens = self.fill(self.bridge(tokens, c), mask)  # [B, N, D']
                patches = self.output(self.decoder(tokens, c), c)  # [B, N, p·p·C]
            else:
                patches = self.output(tokens, c)  # [B, K, p·p·C]
                patches = restore_tokens(patches, mask, jnp.zeros(patches.shape[-1]))
        return unpatchify(patches.astype(jnp.float32), self.patch_size)

    def condition(self, c_noise: jax.Array, labels: jax.Array) -> jax.Array:
        """Condition c [B, D] of every block: noise level plus label."""
        c = self.noise_embedding(c_noise)
        return c if self.label_embedding is None else c + self.label_embedding(labels)

    def embed(self, x: jax.Array, mask: TokenMask | None) -> jax.Array:
        """Visible tokens with their positions, [B, K, D]; hidden patches are never embedded."""
        batch = x.shape[0]
        positions = jnp.broadcast_to(
            self.positions(self.hidden_size), (batch, self.grid**2, self.hidden_size)
        )
        # Patches are dropped before the linear map, positions before they are added: nothing is computed for
        # what is hidden, and the gather is of inputs and constants, which need no gradient.
        patches = keep_tokens(patchify(x, self.patch_size), mask)
        return self.patch_embedding(patches) + keep_tokens(positions, mask)

    def fill(self, kept: jax.Array, mask: TokenMask | None) -> jax.Array:
        """Decoder tokens [B, N, D'] from the visible ones: mask tokens in the holes, positions added."""
        width = kept.shape[-1]
        filler = jnp.zeros(width) if self.mask_token is None else self.mask_token[...]
        tokens = restore_tokens(kept, mask, filler)
        return tokens + self.positions(width)

    def positions(self, width: int) -> jax.Array:
        """Fixed position table [1, N, width]."""
        return jnp.asarray(position_table(width, self.grid), self.dtype)[None]
