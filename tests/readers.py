"""Everything that reads foreign files: how to write a sound, tiny input, and how the commands read it.

tests/test_hostile.py damages such inputs in ways that somebody thought of, tests/fuzz_readers.py at random.
"""

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np
from PIL import Image

from maskdit_jax.data.importing import import_latents
from maskdit_jax.data.shards import finish_shards, read_report, shard_names, write_shard
from maskdit_jax.data.sources import open_source


class Reader(NamedTuple):
    """good(folder): writes a sound input there and returns what to read, a file or a folder.
    read(path): reads it as the commands do; what it writes, if anything, is beside `path`.
    repair(path): makes the checksums right again, so that damage reaches what lies behind them.
    """

    good: Callable[[Path], Path]
    read: Callable[[Path], object]
    repair: Callable[[Path], None] = lambda path: None


READERS: dict[str, Reader] = {}


# Data: a folder of moments

MOMENTS_SHAPE = (5, 2, 4, 4, 6)  # of both shards: images, views, H, W, (mean, logvar)


def write_moments(folder: Path) -> Path:
    """Two shards, of three images and of two, of classes 0 … 4."""
    path, names = folder / "in", shard_names(2)
    path.mkdir(parents=True)
    moments = np.zeros(MOMENTS_SHAPE, np.float32)
    for name, images in zip(names, ([0, 1, 2], [3, 4]), strict=True):
        write_shard(path, name, moments[images], np.array(images), skipped=["a.jpg"])
    reports = [report for name in names if (report := read_report(path, name))]
    finish_shards(path, reports, num_classes=5, latent_scale=1.0, about={"source": "test"})
    return path


def read_moments(path: Path) -> object:
    source = open_source(f"latents:{path}", image_size=4, channels=3, num_classes=5, space="latents")
    return source.read(np.arange(len(source)), np.arange(len(source)))


READERS["moments"] = Reader(write_moments, read_moments)


# Data: published caches, as LMDB and as tars

LABELS = [0, 2, 1, 0, 2, 1]  # of six items: three images and their flips


def items(side: int = 4) -> list[np.ndarray]:
    """Six moments [8, side, side], of zeros but for one value each: damage then seldom hits only values."""
    return [np.eye(1, 8 * side**2, i, dtype=np.float32).reshape(8, side, side) for i in range(6)]


def lmdb_keys() -> dict[str, bytes]:
    """With values of 8 KiB, which LMDB keeps in pages of their own, as it does the published ones."""
    keys = {"length": b"6"}
    for i, (label, moments) in enumerate(zip(LABELS, items(16), strict=True)):
        keys |= {f"z-{i}": moments.tobytes(), f"y-{i}": b"%d" % label}
    return keys


def write_lmdb(folder: Path, keys: dict[str, bytes] | None = None) -> Path:
    path = folder / "in"
    path.mkdir(parents=True, exist_ok=True)
    (path / "data.mdb").unlink(missing_ok=True)
    with lmdb.open(str(path), map_size=2**24) as env, env.begin(write=True) as transaction:
        for key, value in (lmdb_keys() if keys is None else keys).items():
            transaction.put(key.encode(), value)
    (path / "lock.mdb").unlink()
    return path


def tar_members() -> dict[str, bytes]:
    members = {}
    for i, (label, moments) in enumerate(zip(LABELS, items(), strict=True)):
        members |= {f"{i:07d}.cls": b"%d" % label, f"{i:07d}.latent": pickle.dumps(moments, protocol=4)}
    return members


def write_tar(folder: Path, members: dict[str, bytes] | None = None, name: str = "x.tar") -> Path:
    path = folder / "in"
    path.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path / name, "w") as tar:
        for member, content in (tar_members() if members is None else members).items():
            header = tarfile.TarInfo(member)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def repair_tar(path: Path) -> None:
    """Make the checksum of every block that was a header right again."""
    for file in path.glob("*.tar"):
        content = bytearray(file.read_bytes())
        for start in range(0, len(content) - 511, 512):
            header = content[start : start + 512]
            if b"ustar" in header[250:270] or b".cls\0" in header[:100] or b".latent\0" in header[:100]:
                total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
                content[start + 148 : start + 156] = b"%06o\0 " % total
        file.write_bytes(content)


def read_published(path: Path, format: str) -> object:
    options = {"num_classes": 3, "latent_scale": 1.0, "flips": True, "shard_size": 100}
    return import_latents(path, path.with_name("out"), format=format, **options)


READERS["lmdb"] = Reader(write_lmdb, lambda path: read_published(path, "lmdb"))
READERS["tar"] = Reader(write_tar, lambda path: read_published(path, "webdataset"), repair_tar)


# Data: folders of images


def write_images(folder: Path) -> Path:
    """A few kinds of files in the folders of two classes."""
    path, ramp = folder / "in", np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
    picture = Image.fromarray(ramp)
    turned = Image.Exif()
    turned[0x0112] = 6
    (path / "ant").mkdir(parents=True)
    (path / "bee").mkdir()
    picture.save(path / "ant/rgb.png")
    picture.convert("P").save(path / "ant/palette.png", transparency=3)
    picture.save(path / "ant/turned.jpg", exif=turned)
    picture.convert("CMYK").save(path / "bee/cmyk.jpeg", quality=70)
    picture.convert("RGBA").save(path / "bee/rgba.webp", lossless=True)
    Image.fromarray(ramp[..., 0].astype(np.uint16) * 257).save(path / "bee/deep.png")
    return path


def read_images(path: Path) -> object:
    source = open_source(
        f"folder:{path}", image_size=24, channels=3, num_classes=2, space="pixels", max_zoom=1.5
    )
    return source.read(np.arange(len(source)), np.arange(len(source)))


def repair_images(path: Path) -> None:
    """Make the checksums of the chunks of PNG files right again, as far as the lengths lead to them."""
    for file in path.rglob("*.png"):
        content, start = bytearray(file.read_bytes()), 8
        while start + 12 <= len(content):
            end = start + 8 + int.from_bytes(content[start : start + 4], "big")
            if end + 4 > len(content):
                break
            content[end : end + 4] = zlib.crc32(content[start + 4 : end]).to_bytes(4, "big")
            start = end + 4
        file.write_bytes(content)


READERS["image"] = Reader(write_images, read_images, repair_images)
