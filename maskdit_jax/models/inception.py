"""Inception-v3 as FID uses it (arXiv 1512.00567): the network that TensorFlow published on 2015-12-05.

It differs from the Inception-v3 of torchvision: 1,008 classes, average pools that leave the padding out, and
a max pool in the last block. Modules are named as in torchvision, the layout in which its weights are
passed on. Batch norm is part of the convolution before it (interop/inception.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

SIDE = 299  # pixels of the images that the network sees
POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7  # of the block Mixed_6d, on 17 × 17 places: sFID's 2,023 features
CLASSES = 1008


class InceptionV3(nnx.Module):
    """Features of images. All arithmetic is float32, at the highest precision of products."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, strides=2, padding="VALID", rngs=rngs)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="VALID", rngs=rngs)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, rngs=rngs)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1, rngs=rngs)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="VALID", rngs=rngs)
        self.Mixed_5b = InceptionA(192, 32, rngs=rngs)
        self.Mixed_5c = InceptionA(256, 64, rngs=rngs)
        self.Mixed_5d = InceptionA(288, 64, rngs=rngs)
        self.Mixed_6a = InceptionB(288, rngs=rngs)
        self.Mixed_6b = InceptionC(128, rngs=rngs)
        self.Mixed_6c = InceptionC(160, rngs=rngs)
        self.Mixed_6d = InceptionC(160, rngs=rngs)
        self.Mixed_6e = InceptionC(192, rngs=rngs)
        self.Mixed_7a = InceptionD(rngs=rngs)
        self.Mixed_7b = InceptionE(1280, average_pool, rngs=rngs)
        self.Mixed_7c = InceptionE(2048, max_pool, rngs=rngs)
        self.fc = nnx.Linear(POOL_FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Features of images [B, 299, 299, 3] float32 of 0 … 255.

        pool [B, 2048]: the mean over all places of the last block (FID's). spatial [B, 17·17·7]: the first
        channels of the 1×1 branch of Mixed_6d, in the order H, W, C (sFID's; arXiv 2103.03841). logits
        [B, 1008]: the classifier's without its bias, which the Inception score has never had (ADM).
        """
        with jax.default_matmul_precision("highest"):
            x = (x - 128) / 128
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = shrinking_pool(x)  # [B, 73, 73, 64]
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
            x = shrinking_pool(x)  # [B, 35, 35, 192]
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
            x = self.Mixed_6a(x)  # [B, 17, 17, 768]
            x = self.Mixed_6c(self.Mixed_6b(x))
            spatial = self.Mixed_6d.branch1x1(x)[..., :SPATIAL_CHANNELS]
            x = self.Mixed_6e(self.Mixed_6d(x))
            x = self.Mixed_7a(x)  # [B, 8, 8, 1280]
            x = self.Mixed_7c(self.Mixed_7b(x))
            pool = x.mean(axis=(1, 2))
            logits = pool @ self.fc.kernel[...]
        return {"pool": pool, "spatial": spatial.reshape(len(x), -1), "logits": logits}


class InceptionA(nnx.Module):
    """Branches of 1×1, 5×5 and twice 3×3 (figure 5), and the average pool's."""

    def __init__(self, channels: int, pool_features: int, *, rngs: nnx.Rngs):
        self.branch1x1 = Conv(channels, 64, 1, rngs=rngs)
        self.branch5x5_1 = Conv(channels, 48, 1, rngs=rngs)
        self.branch5x5_2 = Conv(48, 64, 5, rngs=rngs)
        self.branch3x3dbl_1 = Conv(channels, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = Conv(64, 96, 3, rngs=rngs)
        self.branch3x3dbl_3 = Conv(96, 96, 3, rngs=rngs)
        self.branch_pool = Conv(channels, pool_features, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _concatenate(
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average_pool(x)),
        )


class InceptionB(nnx.Module):
    """From 35×35 to 17×17 places (figure 10)."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.branch3x3 = Conv(channels, 384, 3, strides=2, padding="VALID", rngs=rngs)
        self.branch3x3dbl_1 = Conv(channels, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = Conv(64, 96, 3, rngs=rngs)
        self.branch3x3dbl_3 = Conv(96, 96, 3, strides=2, padding="VALID", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _concatenate(
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            shrinking_pool(x),
        )


class InceptionC(nnx.Module):
    """7×7 as rows and columns, once and twice, of inner width `width` (figure 6)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(768, 192, 1, rngs=rngs)
        self.branch7x7_1 = Conv(768, width, 1, rngs=rngs)
        self.branch7x7_2 = Conv(width, width, row, rngs=rngs)
        self.branch7x7_3 = Conv(width, 192, column, rngs=rngs)
        self.branch7x7dbl_1 = Conv(768, width, 1, rngs=rngs)
        self.branch7x7dbl_2 = Conv(width, width, column, rngs=rngs)
        self.branch7x7dbl_3 = Conv(width, width, row, rngs=rngs)
        self.branch7x7dbl_4 = Conv(width, width, column, rngs=rngs)
        self.branch7x7dbl_5 = Conv(width, 192, row, rngs=rngs)
        self.branch_pool = Conv(768, 192, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return _concatenate(
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(twice)),
            self.branch_pool(average_pool(x)),
        )


class InceptionD(nnx.Module):
    """From 17×17 to 8×8 places."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.branch3x3_1 = Conv(768, 192, 1, rngs=rngs)
        self.branch3x3_2 = Conv(192, 320, 3, strides=2, padding="VALID", rngs=rngs)
        self.branch7x7x3_1 = Conv(768, 192, 1, rngs=rngs)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), rngs=rngs)
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), rngs=rngs)
        self.branch7x7x3_4 = Conv(192, 192, 3, strides=2, padding="VALID", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return _concatenate(
            self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), shrinking_pool(x)
        )


class InceptionE(nnx.Module):
    """Wide branches that end in a row beside a column (figure 7); the last pool takes the maximum."""

    def __init__(self, channels: int, pool, *, rngs: nnx.Rngs):
        self.pool = pool
        self.branch1x1 = Conv(channels, 320, 1, rngs=rngs)
        self.branch3x3_1 = Conv(channels, 384, 1, rngs=rngs)
        self.branch3x3_2a = Conv(384, 384, (1, 3), rngs=rngs)
        self.branch3x3_2b = Conv(384, 384, (3, 1), rngs=rngs)
        self.branch3x3dbl_1 = Conv(channels, 448, 1, rngs=rngs)
        self.branch3x3dbl_2 = Conv(448, 384, 3, rngs=rngs)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), rngs=rngs)
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), rngs=rngs)
        self.branch_pool = Conv(channels, 192, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return _concatenate(
            self.branch1x1(x),
            self.branch3x3_2a(once),
            self.branch3x3_2b(once),
            self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice),
            self.branch_pool(self.pool(x)),
        )


class Conv(nnx.Module):
    """Convolution, with what batch norm does to its result as its bias and in its weights, and ReLU."""

    def __init__(self, in_channels, out_channels, size, *, strides=1, padding="SAME", rngs: nnx.Rngs):
        size = (size, size) if isinstance(size, int) else size
        self.conv = nnx.Conv(in_channels, out_channels, size, strides=strides, padding=padding, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.conv(x))


def average_pool(x: jax.Array) -> jax.Array:
    """Mean over each 3×3 neighbourhood, at the border over the places that there are."""
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


def max_pool(x: jax.Array) -> jax.Array:
    """Largest of each 3×3 neighbourhood."""
    return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")


def shrinking_pool(x: jax.Array) -> jax.Array:
    """Largest of every second 3×3 neighbourhood."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")


def _concatenate(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


def resize(images: jax.Array, side: int = SIDE) -> jax.Array:
    """Images [B, H, W, C] float32 → [B, side, side, C], as TensorFlow 1 resizes by default, bit for bit.

    Pixel i lies at i·in/out of the old ones, without half-pixel centres, between the one below and the next,
    which at the end is the last. Not to be put under `jit`: each product is rounded before it is added, but
    XLA would make one operation, rounded once, of the two.
    """
    for axis in (2, 1):
        low, high, share = _neighbours(images.shape[axis], side)
        before, after = jnp.take(images, low, axis=axis), jnp.take(images, high, axis=axis)
        images = before + (after - before) * share.reshape(1, *(-1 if a == axis else 1 for a in (1, 2)), 1)
    return images


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels below and above each new one, and how far it is from the one below."""
    place = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
    low = np.floor(place).astype(np.int32)
    return low, np.minimum(low + 1, old - 1), place - low.astype(np.float32)
