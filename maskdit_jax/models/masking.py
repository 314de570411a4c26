"""Which tokens the encoder sees: draw masks, keep the visible tokens, put them back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASK_TYPES = ("none", "patch", "block", "crop")


class TokenMask(NamedTuple):
    """A split of N tokens into K visible and N - K hidden ones, for each sample.

    shuffle_ids [B, N]: the visible tokens' places in the order the encoder sees them, then the
    hidden ones'. restore_ids [B, N]: its inverse permutation. keep_ids [B, K]: its first K columns.
    """

    keep_ids: jax.Array
    shuffle_ids: jax.Array
    restore_ids: jax.Array

    @property
    def hidden(self) -> jax.Array:
        """[B, N] float32: 1 = hidden, 0 = visible."""
        return (self.restore_ids >= self.keep_ids.shape[1]).astype(jnp.float32)


def count_kept(num_tokens: int, mask_ratio: float) -> int:
    """Number of visible tokens K = int(N·(1 - mask_ratio))."""
    return int(num_tokens * (1 - mask_ratio))


def random_mask(uniform: jax.Array, num_keep: int) -> TokenMask:
    """Keep the `num_keep` tokens with the smallest of the uniform numbers [B, N] (MaskDiT, sec. 3.2)."""
    return _mask_of(jnp.argsort(uniform, axis=1), num_keep)


def count_visible_patches(mask_type: str, grid: int, *, ratio: float, block_size: int, crop_size: int) -> int:
    """Number of visible patches of a grid×grid image under a mask of one of MASK_TYPES.

    Of the N patches `patch` hides ⌊ratio·N⌋ and `block` as many whole blocks as fit into these, so never
    more than the ratio says; `crop` leaves crop_size² visible, whatever the ratio (MaskDM, arXiv 2306.11363).
    """
    num_patches = grid**2
    if mask_type == "none":
        return num_patches
    if mask_type == "crop":
        return crop_size**2
    area = block_size**2 if mask_type == "block" else 1
    return num_patches - int(ratio * num_patches) // area * area


def block_mask(uniform: jax.Array, grid: int, block_size: int, num_keep: int) -> TokenMask:
    """Keep num_keep / block_size² of a grid's aligned blocks, those with the smallest numbers.

    uniform [B, (grid / block_size)²]: a number for each block, row by row.
    """
    blocks = grid // block_size
    ids = jnp.arange(grid**2).reshape(blocks, block_size, blocks, block_size)
    ids = ids.transpose(0, 2, 1, 3).reshape(blocks**2, block_size**2)  # the patches of each block
    return _mask_of(ids[jnp.argsort(uniform, axis=1)].reshape(len(uniform), grid**2), num_keep)


def crop_mask(corners: jax.Array, grid: int, crop_size: int) -> TokenMask:
    """Keep a window of crop_size² patches; corners [B, 2] int: the row and column of its first patch."""
    row, column = corners[:, :1], corners[:, 1:]  # [B, 1]
    rows, columns = jnp.divmod(jnp.arange(grid**2)[None], grid)
    inside = (row <= rows) & (rows < row + crop_size) & (column <= columns) & (columns < column + crop_size)
    return _mask_of(jnp.argsort(~inside, axis=1, stable=True), crop_size**2)


def _mask_of(shuffle_ids: jax.Array, num_keep: int) -> TokenMask:
    # As float32, which holds them exactly: a sort of whole numbers that another sort has ordered is made a
    # scatter by XLA, where there are several devices.
    restore_ids = jnp.argsort(shuffle_ids.astype(jnp.float32), axis=1)
    return TokenMask(shuffle_ids[:, :num_keep], shuffle_ids, restore_ids)


@jax.custom_vjp
def permute_tokens(x: jax.Array, ids: jax.Array, inverse_ids: jax.Array) -> jax.Array:
    """Reorder tokens x [B, N, D] by the permutations ids [B, N], whose inverses are `inverse_ids`.

    The backward pass is the opposite gather, where autodiff would leave a scatter-add.
    """
    return _take(x, ids)


def _take(x, ids):
    return jnp.take_along_axis(x, ids[:, :, None], axis=1, mode="clip")


permute_tokens.defvjp(
    lambda x, ids, inverse_ids: (_take(x, ids), inverse_ids),
    lambda inverse_ids, g: (_take(g, inverse_ids), None, None),
)


def keep_tokens(x: jax.Array, mask: TokenMask | None) -> jax.Array:
    """Visible tokens [B, K, D] of x [B, N, D]. For inputs and constants: the gradient would be a scatter."""
    return x if mask is None else _take(x, mask.keep_ids)


def keep_rows(table: jax.Array, mask: TokenMask) -> jax.Array:
    """Rows [B, K, D] of a table [N, D], one row for each token: those of the visible ones."""
    return _keep_rows(table, mask.keep_ids)


@jax.custom_vjp
def _keep_rows(table: jax.Array, keep_ids: jax.Array) -> jax.Array:
    return jnp.take(table, keep_ids, axis=0, mode="clip")


def _keep_rows_backward(saved, g):
    """Sample after sample, in each of which a row is there once: no collisions, nothing of size [B, N, D]."""
    table, keep_ids = saved

    def add(i, total):
        return total.at[keep_ids[i]].add(g[i], unique_indices=True, mode="promise_in_bounds")

    return jax.lax.fori_loop(0, len(g), add, jnp.zeros_like(table)), None


_keep_rows.defvjp(
    lambda table, keep_ids: (_keep_rows(table, keep_ids), (table, keep_ids)), _keep_rows_backward
)


def keep_pairs(pairs: jax.Array, mask: TokenMask) -> jax.Array:
    """Those values [B, h, K, K] of pairs [h, N, N], a value for each two tokens, that are of visible ones."""
    return _keep_pairs(pairs, mask.keep_ids, mask.restore_ids)


@jax.custom_vjp
def _keep_pairs(pairs: jax.Array, keep_ids: jax.Array, restore_ids: jax.Array) -> jax.Array:
    rows = jnp.moveaxis(jnp.take(pairs, keep_ids, axis=1, mode="clip"), 0, 1)  # [B, h, K, N]
    return jnp.take_along_axis(rows, keep_ids[:, None, None], axis=3, mode="clip")


def _keep_pairs_backward(saved, g):
    # A GPU would start thousands of small kernels one after the other, a CPU gather what is mostly zero.
    of_all = jax.lax.platform_dependent(
        g, *saved, cuda=sum_pairs_at_once, rocm=sum_pairs_at_once, default=sum_pairs_in_turn
    )
    return of_all, None, None


def sum_pairs_in_turn(g: jax.Array, keep_ids: jax.Array, restore_ids: jax.Array) -> jax.Array:
    """[h, N, N]: the sum of g [B, h, K, K] over samples, each pair at its place, where no other is."""
    num_tokens = restore_ids.shape[1]

    def add(i, total):
        ids = keep_ids[i]
        return total.at[:, ids[:, None], ids].add(g[i], unique_indices=True, mode="promise_in_bounds")

    return jax.lax.fori_loop(0, len(g), add, jnp.zeros((g.shape[1], num_tokens, num_tokens), g.dtype))


def sum_pairs_at_once(g: jax.Array, keep_ids: jax.Array, restore_ids: jax.Array) -> jax.Array:
    """The same by a gather from each sample."""
    num_keep, (batch, num_tokens) = keep_ids.shape[1], restore_ids.shape
    ids = jnp.minimum(restore_ids, num_keep - 1)
    pair_ids = (ids[:, :, None] * num_keep + ids[:, None]).reshape(batch, 1, num_tokens**2)
    flat = g.reshape(*g.shape[:2], num_keep**2)
    values = jnp.take_along_axis(flat, pair_ids, axis=2, mode="clip")
    visible = restore_ids < num_keep
    both = (visible[:, :, None] & visible[:, None]).reshape(batch, 1, num_tokens**2)
    return jnp.where(both, values, 0).sum(axis=0).reshape(-1, num_tokens, num_tokens)


_keep_pairs.defvjp(
    lambda pairs, keep_ids, restore_ids: (
        _keep_pairs(pairs, keep_ids, restore_ids),
        (keep_ids, restore_ids),
    ),
    _keep_pairs_backward,
)


def restore_tokens(kept: jax.Array, mask: TokenMask | None, filler: jax.Array) -> jax.Array:
    """Tokens [B, N, D]: the visible ones [B, K, D] at their places, `filler` [D] in the holes."""
    if mask is None:
        return kept
    batch, num_keep, width = kept.shape
    holes = jnp.broadcast_to(filler, (batch, mask.restore_ids.shape[1] - num_keep, width))
    tokens = jnp.concatenate([kept, holes.astype(kept.dtype)], axis=1)
    return permute_tokens(tokens, mask.restore_ids, mask.shuffle_ids)
