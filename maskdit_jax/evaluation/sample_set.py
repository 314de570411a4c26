"""Sets of samples as they lie on the disk: a folder that `sample` wrote, an ADM .npz, a folder of images.

Images are read as they are and never resized: that would change what is measured.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskdit_jax.data.image_sets import SUFFIXES
from maskdit_jax.data.images import MAX_FILE_BYTES, decode_image, read_png
from maskdit_jax.errors import UserError, shown
from maskdit_jax.evaluation.npz import BATCH_BYTES, Npz
from maskdit_jax.files import read_json

ABOUT, ARRAYS = "samples.json", "samples.npz"
# Where arrays of features, given by a user, may stand in their file.
FEATURES = ("features", "pool", "arr_0")
_THREADS = 4  # that decode images
MAX_DEPTH = 5  # of samples.json, of which ours have three


@dataclass(frozen=True)
class SampleSet:
    """Images or latents on the disk.

    count: of the samples; image_shape: [H, W, C] of each; dtype: uint8, or float32 in [-1, 1] or latents;
    about: what samples.json says of them, {} where there is none; read(batch_size): all of them in their
    order, in batches [B, H, W, C] of at most so many, in bounded memory. A UserError comes when what is
    damaged is reached.
    """

    path: Path
    count: int
    image_shape: tuple[int, int, int]
    dtype: np.dtype
    about: dict[str, Any]
    read: Callable[[int], Iterator[np.ndarray]]

    def sha256(self) -> str:
        """Of the file, where it is one."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def open_samples(path: str | Path, num_samples: int | None = None) -> SampleSet:
    """The samples at a path, or the first `num_samples` of them.

    Args:
      path: a folder that `sample` wrote (samples.json with samples.npz or PNGs), a folder of images, flat or
        nested, in the order of their names, or a .npz with arr_0 [n, H, W, C], uint8 or float32.

    Raises:
      UserError: nothing that can be read, not finished, or fewer than `num_samples`.
    """
    path = Path(path)
    folder = path.parent if path.name == ARRAYS else path
    about = read_json(folder / ABOUT) if (folder / ABOUT).exists() else {}
    if about:
        _check_about(about, folder / ABOUT)
    if not path.is_dir():
        found = _from_npz(path, num_samples, about)
    elif about and (path / ARRAYS).exists():
        found = _from_npz(path / ARRAYS, num_samples, about)
    else:
        found = _from_images(path, num_samples, about)
    if about and num_samples is None and found.count != about["num_samples"]:
        raise UserError(
            f"{path} holds {found.count:,} samples, {ABOUT} in it says {about['num_samples']:,}: the command "
            f"that made them, given again, makes what is missing; an older {ARRAYS} beside images is to go"
        )
    return found


def _check_about(about: dict[str, Any], file: Path) -> None:
    if about.get("finished") is not True:
        raise UserError(f"{file}: these samples are not finished: give the command that makes them again")
    count, shape = about.get("num_samples"), about.get("image_shape", [1, 1, 1])
    if type(count) is not int or count < 1:
        raise UserError(f"{file}: num_samples={shown(count)}, expected a whole number of at least 1")
    if not isinstance(shape, list) or len(shape) != 3 or any(type(n) is not int or n < 1 for n in shape):
        raise UserError(f"{file}: image_shape={shown(shape)}, expected [height, width, channels]")
    if not _is_flat(about, MAX_DEPTH):  # it is written again, into the card
        raise UserError(f"{file} is damaged: its lists and objects are nested too deeply")


def _is_flat(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_flat(x, depth - 1) for x in inner)


def _taken(available: int, wanted: int | None, path: Path) -> int:
    if wanted is None:
        return available
    if not 1 <= wanted <= available:
        raise UserError(f"num_samples={wanted}: {path} has {available:,}; choose from 1 to that")
    return wanted


def _from_npz(path: Path, num_samples: int | None, about: dict[str, Any]) -> SampleSet:
    arrays = Npz(path)
    member = arrays.member("arr_0")
    shape, dtype = member.shape, member.dtype
    if len(shape) != 4 or min(shape) < 1 or dtype not in (np.uint8, np.float32):
        raise UserError(f"{path}: arr_0 is {dtype} {list(shape)}, expected uint8 or float32 [n, H, W, C]")
    if shape[3] not in (1, 3) and dtype == np.uint8:
        raise UserError(f"{path}: arr_0 is {list(shape)}: images have 3 channels or 1, in the last place")
    if list(shape[1:]) != about.get("image_shape", list(shape[1:])):
        raise UserError(f"{path}: arr_0 is {list(shape)}, {ABOUT} says images of {about['image_shape']}")
    count = _taken(shape[0], num_samples, path)
    read = lambda batch_size: arrays.batches("arr_0", batch_size, count)  # noqa: E731
    return SampleSet(path, count, (shape[1], shape[2], shape[3]), dtype, about, read)


def _from_images(path: Path, num_samples: int | None, about: dict[str, Any]) -> SampleSet:
    files = _image_files(path, about)
    if not files:
        raise UserError(f"{path}: no images ({', '.join(SUFFIXES)}) in this folder")
    files = files[: _taken(len(files), num_samples, path)]
    load = functools.partial(_load, written_here=bool(about))
    first = load(files[0])
    shape = first.shape
    if list(shape) != about.get("image_shape", list(shape)):
        raise UserError(f"{files[0]} is {list(shape)}, {ABOUT} says {about['image_shape']}")

    def read(batch_size: int) -> Iterator[np.ndarray]:
        at_once = max(min(batch_size, BATCH_BYTES // first.nbytes), 1)
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(files), at_once):
                part = files[start : start + at_once]
                images = list(pool.map(load, part))
                for file, image in zip(part, images):
                    if image.shape != shape:
                        raise UserError(
                            f"{file} is {list(image.shape)}, others of this set {list(shape)}: samples of "
                            "one size are measured, and never resized"
                        )
                yield np.stack(images)

    return SampleSet(path, len(files), shape, np.dtype(np.uint8), about, read)


def _image_files(path: Path, about: dict[str, Any]) -> list[Path]:
    if about:  # grids and whatever else lie beside the folders of a thousand; names are seeds
        found = [p for p in path.glob("*/*.png") if p.stem.isdecimal() and p.parent.name.isdecimal()]
        return sorted(found, key=lambda p: int(p.stem))
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _load(file: Path, written_here: bool) -> np.ndarray:
    """An image uint8 [H, W, 3], or as `sample` wrote it, where grey has one channel."""
    if not file.is_file():
        raise UserError(f"{file}: not a file")
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise UserError(f"{file}: {size:,} bytes, more than the {MAX_FILE_BYTES:,} of any image")
    if not written_here:
        return np.asarray(decode_image(file.read_bytes(), str(file)))
    image = read_png(file)
    if image.dtype != np.uint8 or image.shape[-1] not in (1, 3):
        raise UserError(f"{file} is {image.dtype} {list(image.shape)}, which `sample` writes none of")
    return image


def open_features(path: str | Path, num_samples: int | None = None) -> SampleSet:
    """Features [n, D] that a user has made, as "images" [1, 1, D]: `features`, `pool` or arr_0 of a .npz.

    Raises:
      UserError: no such array in it.
    """
    path = Path(path)
    arrays = Npz(path)
    name = next((name for name in FEATURES if name in arrays.members), FEATURES[0])
    member = arrays.member(name)
    if len(member.shape) != 2 or min(member.shape) < 1 or member.dtype.kind != "f":
        raise UserError(f"{path}: {name} is {member.dtype} {list(member.shape)}, expected floats [n, D]")
    count = _taken(member.shape[0], num_samples, path)
    read = lambda batch_size: (  # noqa: E731
        x.astype(np.float32)[:, None, None] for x in arrays.batches(name, batch_size, count)
    )
    return SampleSet(path, count, (1, 1, member.shape[1]), np.dtype(np.float32), {}, read)
