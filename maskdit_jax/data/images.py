"""Images in and out: files to square arrays, float images to uint8, PNG files, grids."""

import io
from pathlib import Path

import numpy as np

from maskdit_jax.errors import UserError

MIN_SIDE = 8
MAX_PIXELS = 100_000_000  # ImageNet's largest image has 17 million


def decode_image(content: bytes, name: str):
    """A JPEG, PNG or WebP file as a PIL image in RGB; `name` is for messages.

    CMYK, palettes and grey become RGB, transparency is dropped, 16 bits per channel become 8.

    Raises:
      UserError: damaged, animated, too small or too large (checked before anything is decoded).
    """
    from PIL import Image  # the core of the package runs without Pillow

    try:
        image = Image.open(io.BytesIO(content))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UserError(
                f"{name}: {width}×{height} pixels, more than {MAX_PIXELS:,}: a decompression bomb?"
            )
        if min(width, height) < MIN_SIDE:
            raise UserError(f"{name}: {width}×{height} pixels, fewer than {MIN_SIDE} on a side")
        if getattr(image, "n_frames", 1) > 1:
            raise UserError(f"{name}: animated, {image.n_frames} frames; expected one image")
        if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to 8
            high_bytes = np.asarray(image).astype(np.int64) >> 8
            image = Image.fromarray(high_bytes.clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # decoders raise many kinds
        raise UserError(f"{name}: not a readable image ({error})") from error


def centre_square(image, size: int) -> np.ndarray:
    """The middle of a PIL image as uint8 [size, size, 3], as ADM prepares ImageNet.

    Halved by averaging while the short side is at least twice `size`, then resized by bicubic
    interpolation to have a short side of `size`, then cropped at the centre.
    """
    array = _resize_short_side(image, size)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def random_square(image, size: int, rng: np.random.Generator, max_zoom: float) -> np.ndarray:
    """A random square of a PIL image as uint8 [size, size, 3]: resized to a random short side of `size` …
    `max_zoom`·`size`, then cropped anywhere."""
    short = round(size * rng.uniform(1, max_zoom))
    array = _resize_short_side(image, short)
    top, left = (int(rng.integers(0, length - size + 1)) for length in array.shape[:2])
    return array[top : top + size, left : left + size]


def _resize_short_side(image, size: int) -> np.ndarray:
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize([max(round(side * scale), size) for side in image.size], Image.Resampling.BICUBIC)
    return np.asarray(image)


def to_float(images: np.ndarray) -> np.ndarray:
    """Images uint8 0–255 → float32 in [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - 1


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] → uint8 0–255: (x + 1)·127.5, clamped, truncated (as MaskDiT and EDM)."""
    return np.clip((np.asarray(images) + 1) * 127.5, 0, 255).astype(np.uint8)


def tile(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Grid of images [n, H, W, C] → [rows·(H + gap) + gap, columns·(W + gap) + gap, C], mid-grey between."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    grid = np.full((rows, height + gap, columns, width + gap, channels), 128, images.dtype)
    for i, image in enumerate(images):
        grid[i // columns, gap:, i % columns, gap:] = image
    grid = grid.reshape(rows * (height + gap), columns * (width + gap), channels)
    return np.pad(grid, [(0, gap), (0, gap), (0, 0)], constant_values=128)


def save_png(path: Path, image: np.ndarray) -> None:
    """Write image [H, W, 1 or 3] uint8 as a PNG."""
    from PIL import Image  # sampling to npz needs no Pillow

    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)
