"""DiT's network (arXiv 2212.09748), and what MaskDiT's has of it: embeddings and conditioned blocks."""

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
from maskdit_jax.models.masking import TokenMask, keep_tokens


def modulated_blocks(
    depth: int, width: int, num_heads: int, condition_size: int, *, compute: Compute, rngs: nnx.Rngs
) -> BlockStack:
    """A stack of blocks with adaLN-Zero."""

    def block(rngs):
        return Block(width, num_heads, condition_size, dtype=compute.dtype, rngs=rngs)

    return BlockStack(block, depth, compute=compute, rngs=rngs)


class Encoder(nnx.Module):
    """Patches, noise level and labels embedded, and the blocks of the visible tokens; no output yet.

    num_classes 0 is an unconditional network. `null_row`: "no class" is a row of the label table.
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
        null_row: bool,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.matmul_precision = compute.matmul_precision
        self.dtype = dtype = compute.dtype
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.hidden_size = hidden_size
        self.patch_embedding = Linear(patch_size**2 * channels, hidden_size, dtype=dtype, rngs=rngs)
        self.noise_embedding = NoiseEmbedding(hidden_size, dtype=dtype, rngs=rngs)
        self.label_embedding = nnx.data(None)
        if num_classes:
            self.label_embedding = LabelEmbedding(
                num_classes, hidden_size, null_row=null_row, dtype=dtype, rngs=rngs
            )
        self.encoder = modulated_blocks(
            depth, hidden_size, num_heads, hidden_size, compute=compute, rngs=rngs
        )

    def condition(self, noise_level: jax.Array, labels: jax.Array) -> jax.Array:
        """Condition c [B, D] of every block: noise level plus label."""
        c = self.noise_embedding(noise_level)
        return c if self.label_embedding is None else c + self.label_embedding(labels)

    def embed(self, x: jax.Array, mask: TokenMask | None = None) -> jax.Array:
        """Visible tokens with their positions, [B, K, D]; hidden patches are never embedded."""
        batch = x.shape[0]
        positions = jnp.broadcast_to(
            self.positions(self.hidden_size), (batch, self.grid**2, self.hidden_size)
        )
        # Patches are dropped before the linear map, positions before they are added: nothing is computed for
        # what is hidden, and the gather is of inputs and constants, which need no gradient.
        patches = keep_tokens(patchify(x, self.patch_size), mask)
        return self.patch_embedding(patches) + keep_tokens(positions, mask)

    def positions(self, width: int) -> jax.Array:
        """Fixed position table [1, N, width]."""
        return jnp.asarray(position_table(width, self.grid), self.dtype)[None]


class DiT(Encoder):
    """The network F(x, t, labels) of all tokens; twice as many channels come out, for noise and variance."""

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
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            image_size=image_size,
            channels=channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            null_row=True,
            compute=compute,
            rngs=rngs,
        )
        patch_values = 2 * patch_size**2 * channels
        self.output = ModulatedLinear(hidden_size, hidden_size, patch_values, dtype=compute.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        """F for x [B, H, W, C], timesteps t [B], labels [B] int (-1 = no class) → [B, H, W, 2C] float32."""
        with jax.default_matmul_precision(self.matmul_precision):
            c = self.condition(t, labels)  # [B, D]
            patches = self.output(self.encoder(self.embed(x), c), c)  # [B, N, p·p·2C]
        return unpatchify(patches.astype(jnp.float32), self.patch_size)
