"""Pixels out: float images to uint8, PNG files, grids."""

from pathlib import Path

import numpy as np


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
