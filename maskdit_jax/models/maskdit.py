"""MaskDiT's network F (arXiv 2306.09305, sec. 3): an encoder of the visible tokens, a light decoder of all.

Without decoder it is a plain DiT.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from maskdit_jax.models.blocks import ModulatedLinear
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.dit import Encoder, modulated_blocks
from maskdit_jax.models.embed import unpatchify
from maskdit_jax.models.masking import TokenMask, restore_tokens

# (depth, hidden_size, num_heads); a size is written NAME/PATCH, for example "XL/2".
SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "H": (32, 1280, 16),
}
PATCH_SIZES = (2, 4, 8)


class MaskDiT(Encoder):
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
        super().__init__(
            image_size=image_size,
            channels=channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            null_row=False,
            compute=compute,
            rngs=rngs,
        )
        dtype = compute.dtype
        self.use_decoder = use_decoder
        width = decoder_hidden_size if use_decoder else hidden_size
        self.mask_token = nnx.data(None)
        if use_decoder:
            self.bridge = ModulatedLinear(hidden_size, hidden_size, width, dtype=dtype, rngs=rngs)
            if mask_token:
                self.mask_token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (width,)))
            self.decoder = modulated_blocks(
                decoder_depth, width, decoder_num_heads, hidden_size, compute=compute, rngs=rngs
            )
        self.output = ModulatedLinear(width, hidden_size, patch_size**2 * channels, dtype=dtype, rngs=rngs)

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

    def fill(self, kept: jax.Array, mask: TokenMask | None) -> jax.Array:
        """Decoder tokens [B, N, D'] from the visible ones: mask tokens in the holes, positions added."""
        width = kept.shape[-1]
        filler = jnp.zeros(width) if self.mask_token is None else self.mask_token[...]
        tokens = restore_tokens(kept, mask, filler)
        return tokens + self.positions(width)
