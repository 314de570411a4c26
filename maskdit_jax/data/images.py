"""Images in and out: files to square arrays, float images to uint8, PNG files, grids."""

import functools
import io
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from maskdit_jax.errors import UserError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_SIDE = 8
# On a contact sheet, images of fewer pixels than this per side are shown enlarged.
SMALL_IMAGE, ENLARGE = 64, 4
MAX_PIXELS = 110_000_000  # a medium-format camera makes 102 million
# Resized to a short side of s, an image takes up to 4·MAX_ASPECT·s² bytes: 26 MB at 256, 0.4 GB at 1024.
MAX_ASPECT = 100
MAX_FILE_BYTES = 2**29  # above what MAX_PIXELS take without compression
# Not all that Pillow knows: some of its formats run other programs, whatever the name of the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class ImageError(UserError):
    """A file that is there is no image that can be shown."""


@functools.cache
def _pillow() -> ModuleType:
    from PIL import Image  # the core of the package runs without Pillow

    # Of sizes `decode_image` judges itself; damaged EXIF beside a sound picture is nobody's concern.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return Image


def decode_image(content: bytes, name: str, *, upright: bool = True) -> "Image":
    """A JPEG, PNG, WebP, GIF or BMP file as a PIL image in RGB, as a viewer shows it; `name` is for messages.

    Grey, palettes, one bit and CMYK (inverted, as Adobe writes it) become RGB; of 16 bits per channel
    the upper 8 stay; what is transparent is laid over white; colour profiles are not applied. Of the
    several pictures in one photograph (MPO: previews, the second eye) the first is taken, but an
    animation is no photograph and is refused.

    upright: turn the picture as the camera says in EXIF that it was held. ADM and others have prepared
    ImageNet without turning.

    Raises:
      ImageError: damaged, animated, too small, too large or too narrow (checked before it is decoded).
    """
    from PIL import UnidentifiedImageError

    Image = _pillow()
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check(image, name)
        if upright:
            image = _turned(image)
        if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to 8
            high_bytes = np.asarray(image).astype(np.int64) >> 8
            image = Image.fromarray(high_bytes.clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a readable image (none of {', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise many kinds
        raise ImageError(f"{name}: not a readable image ({first_line(error, 150)})") from error


def _check(image: "Image", name: str) -> None:
    """What the header of a file says."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width}×{height} pixels, more than {MAX_PIXELS:,}: a decompression bomb?")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name}: {width}×{height} pixels, fewer than {MIN_SIDE} on a side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{name}: {width}×{height} pixels, one side more than {MAX_ASPECT} times the other")
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ImageError(f"{name}: animated; expected one image")


def _turned(image: "Image") -> "Image":
    from PIL import ImageOps

    try:
        image.getexif()
    except Exception:  # EXIF may be damaged in any way, and tells no direction then
        return image
    return ImageOps.exif_transpose(image)


def centre_square(image: "Image", size: int) -> np.ndarray:
    """The middle of a PIL image as uint8 [size, size, 3], as ADM prepares ImageNet.

    Halved by averaging while the short side is at least twice `size`, then resized by bicubic
    interpolation to have a short side of `size`, then cropped at the centre.
    """
    array = _resize_short_side(image, size)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def random_square(image: "Image", size: int, rng: np.random.Generator, max_zoom: float) -> np.ndarray:
    """A random square of a PIL image as uint8 [size, size, 3]: resized to a random short side of `size` …
    `max_zoom`·`size`, then cropped anywhere."""
    short = round(size * rng.uniform(1, max_zoom))
    array = _resize_short_side(image, short)
    top, left = (int(rng.integers(0, length - size + 1)) for length in array.shape[:2])
    return array[top : top + size, left : left + size]


def _resize_short_side(image: "Image", size: int) -> np.ndarray:
    # Whole, and cropped afterwards: Pillow's resize of a part alone gives other bits.
    resampling = _pillow().Resampling
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resampling.BOX)
    scale = size / min(image.size)
    width, height = (max(round(side * scale), size) for side in image.size)
    return np.asarray(image.resize((width, height), resampling.BICUBIC))


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


def contact_sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """The grid of `tile`, four times as large where images are too small to be seen."""
    grid = tile(images, columns)
    enlarge = ENLARGE if images.shape[1] < SMALL_IMAGE else 1
    return grid.repeat(enlarge, axis=0).repeat(enlarge, axis=1)


def save_png(file: Path | BinaryIO, image: np.ndarray) -> None:
    """Write image [H, W, 1 or 3] uint8 as a PNG, whatever the name of the file."""
    from PIL import Image  # sampling to npz needs no Pillow

    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="PNG")


def read_png(path: Path) -> np.ndarray:
    """Image [H, W, 1 or 3] uint8 that `save_png` wrote.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with _pillow().open(path, formats=["PNG"]) as image:
            _check(image, str(path))
            array = np.asarray(image)
    except UserError:
        raise
    except Exception as error:  # decoders raise many kinds
        raise UserError(f"{path}: not a readable image ({first_line(error, 150)})") from error
    return array if array.ndim == 3 else array[..., None]
