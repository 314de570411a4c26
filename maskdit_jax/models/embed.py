"""What enters a network: patches, noise level, labels, and positions, fixed or learned."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskdit_jax.models.masking import TokenMask, keep_rows

NOISE_FEATURES = 256
MAX_PERIOD = 10_000

xavier_uniform = nnx.initializers.xavier_uniform()
normal = nnx.initializers.normal(0.02)
# Cut at two standard deviations, of which it loses 12 %: 0.02 is the one that is left.
truncated_normal = nnx.initializers.truncated_normal(0.02 / 0.87962566)


class Linear(nnx.Linear):
    """Linear map [..., D_in] → [..., D_out], Xavier-uniform with zero bias unless told otherwise.

    The product runs on a matrix [rows, D_in]: the same program on a GPU, a faster one on a CPU.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_init: nnx.Initializer = xavier_uniform,
        use_bias: bool = True,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features, out_features, use_bias=use_bias, kernel_init=kernel_init, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override] # without out_sharding
        rows = x.reshape(-1, self.in_features)
        return super().__call__(rows).reshape(*x.shape[:-1], self.out_features)


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Patches [B, N, p·p·C] of images [B, H, W, C]: N is row-major, a patch is (row, column, channel)."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def unpatchify(patches: jax.Array, patch_size: int) -> jax.Array:
    """Inverse of `patchify` for square images: [B, N, p·p·C] → [B, H, W, C]."""
    batch, num_tokens, size = patches.shape
    grid, channels = math.isqrt(num_tokens), size // patch_size**2
    x = patches.reshape(batch, grid, grid, patch_size, patch_size, channels)
    side = grid * patch_size
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side, side, channels)


@functools.lru_cache
def position_table(width: int, grid: int) -> np.ndarray:
    """Fixed 2-D sine-cosine table [grid², width], float32 (MaskDiT, sec. 3; MAE).

    The first half of the channels encodes the column, the second half the row; in each half the
    sines come before the cosines. It is no parameter: no gradient, no EMA, nothing to export.
    """
    frequencies = MAX_PERIOD ** -(np.arange(width // 4) / (width // 4))
    rows, columns = np.divmod(np.arange(grid * grid), grid)

    def encode(position):
        angles = np.outer(position, frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    table = np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)
    table.flags.writeable = False
    return table


def noise_features(noise_level: jax.Array, width: int = NOISE_FEATURES) -> jax.Array:
    """Sinusoidal features [B, width] of noise levels [B], c_noise or timesteps: cosines, then sines."""
    half = width // 2
    frequencies = jnp.exp(-math.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    # In float32 whatever the network computes in: neighbouring noise levels are one number in bfloat16.
    angles = noise_level.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class NoiseEmbedding(nnx.Module):
    """Noise level [B] → vector [B, D]: F sinusoidal features, Linear F → inner, SiLU, Linear inner → D."""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_features: int = NOISE_FEATURES,
        inner_size: int = 0,
        kernel_init: nnx.Initializer = normal,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """inner_size 0: D."""
        self.num_features = num_features
        linear = functools.partial(Linear, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.fc1 = linear(num_features, inner_size or hidden_size)
        self.fc2 = linear(inner_size or hidden_size, hidden_size)

    def __call__(self, noise_level: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.silu(self.fc1(noise_features(noise_level, self.num_features))))


class LabelEmbedding(nnx.Module):
    """Labels [B] int → vector [B, D]: a row of a table.

    The label -1, "no class", is the zero vector, or with `null_row` one more row, the last.
    """

    def __init__(
        self,
        num_classes: int,
        hidden_size: int,
        *,
        null_row: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.table = nnx.Param(normal(rngs.params(), (num_classes + null_row, hidden_size)))
        self.null_row = null_row
        self.dtype = dtype

    def __call__(self, labels: jax.Array) -> jax.Array:
        if self.null_row:
            labels = jnp.where(labels < 0, self.table.shape[0] - 1, labels)
        # A product with one-hot rows: the gradient is a matmul too, where a lookup's would be a
        # scatter-add that collapses on a GPU when many samples share a row.
        one_hot = jax.nn.one_hot(labels, self.table.shape[0], dtype=self.dtype)
        return one_hot @ self.table[...].astype(self.dtype)


class LabelToken(nnx.Module):
    """Labels [B] int → one token [B, D], its position added; the label -1, "no class", is a learned vector.

    All that a network has only where it has classes.
    """

    def __init__(self, num_classes: int, hidden_size: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(truncated_normal(rngs.params(), (num_classes, hidden_size)))
        self.null = nnx.Param(truncated_normal(rngs.params(), (hidden_size,)))
        self.position = nnx.Param(truncated_normal(rngs.params(), (hidden_size,)))

    def __call__(self, labels: jax.Array) -> jax.Array:
        rows = jnp.concatenate([self.null[...][None], self.table[...]])
        # A product with one-hot rows, for the reason in LabelEmbedding.
        return jax.nn.one_hot(labels + 1, len(rows)) @ rows + self.position[...][None]


class PositionTable(nnx.Module):
    """A learned position [D] for each of N tokens, added to those that are visible: [B, K, D] → [B, K, D].

    initial [N, D]: what it is before it is trained.
    """

    def __init__(self, initial: jax.Array):
        self.table = nnx.Param(initial)

    def __call__(self, tokens: jax.Array, mask: TokenMask | None) -> jax.Array:
        table = self.table[...]
        positions = table[None] if mask is None else keep_rows(table, mask)
        # In float32, so that the sum over the batch that is the table's gradient is taken in it.
        return (tokens + positions).astype(tokens.dtype)
