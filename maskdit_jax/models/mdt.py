"""MDT's networks (arXiv 2303.14389): DiTs whose attention knows distances, and that guess hidden tokens.

Blocks of the encoder see the visible tokens, a side-interpolater puts something in the holes, the blocks of
the decoder see all tokens. Version 2 has long skips within the encoder, and from the input to the decoder.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maskdit_jax.models import maskdit
from maskdit_jax.models.blocks import Bias, Block, BlockStack, ModulatedLinear
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.embed import (
    LabelEmbedding,
    Linear,
    NoiseEmbedding,
    PositionTable,
    normal,
    patchify,
    position_table,
    unpatchify,
)
from maskdit_jax.models.masking import TokenMask, keep_pairs, permute_tokens, restore_tokens

# (depth, hidden_size, num_heads), as DiT's.
SIZES = {name: maskdit.SIZES[name] for name in ("S", "B", "L", "XL")}
PATCH_SIZES = (2, 4, 8)
# Rows at the end of the published tables of distances, which no token of an MDT looks up.
UNUSED_ROWS = 3


def published_decoder_depth(version: int, hidden_size: int) -> int:
    """Blocks of the decoder in the published networks of that version and width."""
    if version == 1:
        return 2
    return 6 if hidden_size == SIZES["S"][1] else 4


class DistanceTable(nnx.Module):
    """A learned number for each distance between two tokens of a g×g grid and each of h heads.

    table [(2g - 1)², h]: by the difference of the rows, then of the columns, from 1 - g to g - 1.
    """

    def __init__(self, grid: int, num_heads: int):
        self.grid = grid
        self.table = nnx.Param(jnp.zeros(((2 * grid - 1) ** 2, num_heads)))
        self.unused = nnx.Param(jnp.zeros((UNUSED_ROWS, num_heads)))

    def __call__(self, mask: TokenMask | None) -> Bias:
        """What is added to the scores of the visible tokens."""
        return functools.partial(distance_bias, self.table[...], self.grid, mask)


def distance_bias(table: jax.Array, grid: int, mask: TokenMask | None) -> jax.Array:
    """The bias [1, h, N, N] of all tokens, or [B, h, K, K] of those that are visible: query, then key."""
    side = 2 * grid - 1
    rows = _by_difference(table.reshape(side, side, -1), grid)  # [g, g, 2g - 1, h]
    both = _by_difference(jnp.moveaxis(rows, 2, 0), grid)  # columns [g, g], rows [g, g], h
    pairs = both.transpose(4, 2, 0, 3, 1).reshape(-1, grid**2, grid**2)  # [h, N, N]
    return pairs[None] if mask is None else keep_pairs(pairs, mask)


def _by_difference(values: jax.Array, n: int) -> jax.Array:
    """[n, n, …] of values [2n - 1, …]: that at (q, k) is number q - k + n - 1.

    By repeating and cutting alone, of which the gradient is sums and no scatter: in rows of 2n that start
    with the difference 0 and are read as rows of 2n - 1, each begins one earlier than the last.
    """
    rest = values.shape[1:]
    row = jnp.roll(jnp.concatenate([values[::-1], jnp.zeros_like(values[:1])]), 1 - n, axis=0)
    flat = jnp.broadcast_to(row, (n, *row.shape)).reshape(2 * n * n, *rest)
    return flat[: n * (2 * n - 1)].reshape(n, 2 * n - 1, *rest)[:, :n]


class DistanceBlock(Block):
    """A DiT block with a table of distances, of visible tokens x [B, K, D] → [B, K, D].

    skip: `earlier` [B, K, D] enters beside x, through Linear 2D → D.
    """

    def __init__(
        self, width: int, num_heads: int, grid: int, *, skip: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        super().__init__(width, num_heads, width, dtype=dtype, rngs=rngs)
        self.positions = DistanceTable(grid, num_heads)
        self.skip = nnx.data(None)
        if skip:
            self.skip = Linear(2 * width, width, dtype=dtype, rngs=rngs)

    def __call__(  # type: ignore[override] # a mask, of which it makes the bias
        self, x: jax.Array, c: jax.Array, mask: TokenMask | None, earlier: jax.Array | None = None
    ) -> jax.Array:
        if self.skip is not None and earlier is not None:
            x = checkpoint_name(self.skip(jnp.concatenate([x, earlier], axis=-1)), "residual")
        return super().__call__(x, c, self.positions(mask))


class SideInterpolater(nnx.Module):
    """Visible tokens [B, K, D] → all tokens [B, N, D]: a block guesses the hidden ones (MDT, sec. 3.3).

    Positions are added to all; what was visible passes beside the block.
    """

    def __init__(self, block: BlockStack, width: int, grid: int, *, rngs: nnx.Rngs):
        self.mask_token = nnx.Param(normal(rngs.params(), (width,)))
        self.positions = PositionTable(jnp.asarray(position_table(width, grid)))
        self.block = block

    def __call__(self, kept: jax.Array, c: jax.Array, mask: TokenMask | None) -> jax.Array:
        tokens = self.positions(restore_tokens(kept, mask, self.mask_token[...]), None)
        if mask is None:
            return tokens
        return jnp.where(mask.hidden[:, :, None] == 1, self.block(tokens, c, None), tokens)


class MDT(nnx.Module):
    """The network F(x, t, labels, mask); every argument is a number, so any size can be built.

    `depth` blocks in all, decoder_depth of them in the decoder. Version 2: half of the others are in-blocks,
    half out-blocks, each of which gets the output of its mirror image besides; each of the decoder's gets
    the embedded input. num_classes 0 is an unconditional network.
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
        decoder_depth: int,
        version: int = 1,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.matmul_precision = compute.matmul_precision
        self.patch_size = patch_size
        dtype, grid, skips = compute.dtype, image_size // patch_size, version == 2
        patch_values = patch_size**2 * channels

        def blocks(depth, skip=False):
            def block(rngs):
                return DistanceBlock(hidden_size, num_heads, grid, skip=skip, dtype=dtype, rngs=rngs)

            return BlockStack(block, depth, compute=compute, rngs=rngs)

        self.patch_embedding = Linear(patch_values, hidden_size, dtype=dtype, rngs=rngs)
        self.positions = PositionTable(jnp.asarray(position_table(hidden_size, grid)))
        self.noise_embedding = NoiseEmbedding(hidden_size, dtype=dtype, rngs=rngs)
        self.label_embedding = nnx.data(None)
        if num_classes:
            self.label_embedding = LabelEmbedding(
                num_classes, hidden_size, null_row=True, dtype=dtype, rngs=rngs
            )
        encoder_depth = depth - decoder_depth
        self.in_blocks = blocks(encoder_depth // 2 if skips else encoder_depth)
        self.out_blocks = nnx.data(blocks(encoder_depth // 2, skip=True) if skips else None)
        self.side = SideInterpolater(blocks(1), hidden_size, grid, rngs=rngs)
        self.decoder = blocks(decoder_depth, skip=skips)
        # The noise, and for each of its values how large the variance of a step is.
        self.output = ModulatedLinear(hidden_size, hidden_size, 2 * patch_values, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, t: jax.Array, labels: jax.Array, mask: TokenMask | None = None
    ) -> jax.Array:
        """F for x [B, H, W, C], timesteps t [B], labels [B] int (-1 = no class) → [B, H, W, 2C] float32.

        With a mask the encoder sees its K visible tokens only.
        """
        with jax.default_matmul_precision(self.matmul_precision):
            c = self.condition(t, labels)  # [B, D]
            embedded = self.embed(x)  # [B, N, D]
            tokens = self.side(self.encode(visible_tokens(embedded, mask), c, mask), c, mask)  # [B, N, D]
            earlier = () if self.out_blocks is None else (embedded,)
            patches = self.output(self.decoder(tokens, c, None, *earlier), c)  # [B, N, 2·p·p·C]
        return unpatchify(patches.astype(jnp.float32), self.patch_size)

    def condition(self, t: jax.Array, labels: jax.Array) -> jax.Array:
        """Condition c [B, D] of every block: timestep plus label."""
        c = self.noise_embedding(t)
        return c if self.label_embedding is None else c + self.label_embedding(labels)

    def embed(self, x: jax.Array) -> jax.Array:
        """All tokens [B, N, D], with their positions."""
        return self.positions(self.patch_embedding(patchify(x, self.patch_size)), None)

    def encode(self, kept: jax.Array, c: jax.Array, mask: TokenMask | None) -> jax.Array:
        """The blocks on visible tokens, [B, K, D] → [B, K, D]."""
        if self.out_blocks is None:
            return self.in_blocks(kept, c, mask)
        tokens, skips = self.in_blocks(kept, c, mask, emit=True)
        return self.out_blocks(tokens, c, mask, own=skips[::-1])


def visible_tokens(tokens: jax.Array, mask: TokenMask | None) -> jax.Array:
    """Those [B, K, D] of tokens [B, N, D] that are visible; the gradient is a gather."""
    if mask is None:
        return tokens
    return permute_tokens(tokens, mask.shuffle_ids, mask.restore_ids)[:, : mask.keep_ids.shape[1]]
