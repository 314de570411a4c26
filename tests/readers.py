"""Everything that reads foreign files: how to write a sound, tiny input, and how the commands read it.

tests/test_hostile.py damages such inputs in ways that somebody thought of, tests/fuzz_readers.py at random.
"""

import contextlib
import functools
import io
import json
import pickle
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import lmdb
import numpy as np
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from maskdit_jax import export_torch, import_torch, load, load_autoencoder
from maskdit_jax.config import resolve
from maskdit_jax.config_file import load as load_config
from maskdit_jax.data.images import save_png
from maskdit_jax.data.published import import_latents
from maskdit_jax.data.shards import finish_shards, read_report, shard_names, write_shard
from maskdit_jax.data.sources import open_source
from maskdit_jax.evaluation.features import PIXELS
from maskdit_jax.evaluation.reference import make_reference, read_reference, write_reference
from maskdit_jax.evaluation.sample_set import open_features, open_samples
from maskdit_jax.finish import finish
from maskdit_jax.interop import autoencoder, inception, maskdit
from maskdit_jax.methods.maskdit import MaskDiT, MaskDiTNetwork
from maskdit_jax.methods.method import Shape, init_params
from maskdit_jax.models.autoencoder import AutoencoderKL
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.inception import Conv
from maskdit_jax.training.checkpoint import Checkpoints
from maskdit_jax.training.meta import meta_digest

ROOT = Path(__file__).parent.parent


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
    wanted = Shape(image_size=4, channels=3, num_classes=5)
    source = open_source(f"latents:{path}", wanted, space="latents")
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
    members: dict[str, bytes] = {}
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
    return import_latents(
        path,
        path.with_name("out"),
        format=format,
        num_classes=3,
        latent_scale=1.0,
        flips=True,
        shard_size=100,
    )


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
    wanted = Shape(image_size=24, channels=3, num_classes=2)
    source = open_source(f"folder:{path}", wanted, space="pixels", max_zoom=1.5)
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


# Weights: PyTorch's files, and the config.json that an export has beside them

TINY = {"size": "custom", "patch_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 2}
TINY |= {"decoder_hidden_size": 4, "decoder_depth": 1, "decoder_num_heads": 1}
NETWORK, DATA = MaskDiTNetwork(**TINY), Shape(image_size=4, channels=1, num_classes=2)
HEADS = {"num_heads": 2, "decoder_num_heads": 1}


def tiny_zeros() -> dict:
    """Parameters of that network, all of them zero."""
    shapes = jax.eval_shape(lambda: init_params(MaskDiT(NETWORK), DATA, Compute(), 0))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@functools.cache
def tiny_tensors() -> dict[str, np.ndarray]:
    """Tensors of a network by their torch names, of zeros but for the position tables."""
    tensors = maskdit.to_torch(tiny_zeros(), NETWORK, DATA)
    return {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}


def write_pt(folder: Path, legacy: bool = False) -> Path:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    content = {name: torch.tensor(x) for name, x in tiny_tensors().items()}
    torch.save(content, folder / "in.pt", _use_new_zipfile_serialization=not legacy)
    return folder / "in.pt"


def repair_zip(path: Path) -> None:
    """Make the checksum of data.pkl right again, as far as the archive can be read."""
    content = bytearray(path.read_bytes())
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = archive.infolist()[0]
        names = struct.unpack("<HH", content[member.header_offset + 26 : member.header_offset + 30])
        start = member.header_offset + 30 + sum(names)
        checksum = struct.pack("<L", zlib.crc32(content[start : start + member.file_size]))
        at = content.find(b"PK\1\2")
        content[at + 16 : at + 20] = checksum
        path.write_bytes(content)


def write_safetensors(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tiny_tensors(), folder / "in.safetensors", metadata={"format": "pt"})
    return folder / "in.safetensors"


def read_weights(path: Path) -> object:
    import_torch(path, path.with_name("out"), **HEADS)
    return path


def copy_of(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@functools.cache
def export_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import_torch(tiny_tensors(), folder / "imported", **HEADS)
        export_torch(load(folder / "imported"), folder / "out/model.safetensors")
        return content_of(folder / "out")


def read_export(path: Path) -> object:
    """Import, then what `sample` asks of the imported options."""
    out = path.parent.with_name("out")
    import_torch(path.with_name("model.safetensors"), out)
    return load(out).sampler_options()


READERS["pt"] = Reader(write_pt, read_weights, repair_zip)
READERS["old pt"] = Reader(functools.partial(write_pt, legacy=True), read_weights)
READERS["safetensors"] = Reader(write_safetensors, read_weights)
READERS["export"] = Reader(lambda folder: copy_of(export_files(), folder / "in") / "config.json", read_export)


# Weights: the folder of a run, and the card in it


@functools.cache
def run_files() -> dict[str, bytes]:
    """A run with one step, which asks for no card and has one."""
    config = resolve(load_config(str(ROOT / "configs/digits.py")), device_count=jax.device_count())
    with config.unlocked():
        config.method.network.update(**TINY)
        config.data.update(**DATA._asdict())
        config.compute.unroll = "auto"
        config.evaluation.num_samples = 0
    meta = {"config": config.to_dict(), "items_consumed": 7, "seconds": 1.5}
    with tempfile.TemporaryDirectory() as name:
        checkpoints = Checkpoints(name, keep=1)
        # What sampling reads; the rest of a training state would take seconds to digest.
        checkpoints.save_weights(3, {"ema_params": tiny_zeros()}, meta)
        checkpoints.close()
        files = content_of(Path(name))
    guided = {"cfg_scale": 1.5, "class_share": 0.9, "frechet_distance": 3.0, "sampling_s": 1.0}
    card = {"step": 3, "num_samples": 2, "seeds": [0, 1], "sampler": config.sampling.to_dict()}
    card |= {"guided": guided, "unguided": guided, "classifier_accuracy_on_held_out": 0.9}
    card |= {"real_train_frechet_distance": 1.0, "training_s": 1.5, "training_images_per_s": 4.7}
    # samples.png is newer than the checkpoint: nothing has to be sampled anew.
    return files | {"card.json": json.dumps(card).encode(), "samples.png": b""}


def write_run(folder: Path) -> Path:
    return copy_of(run_files(), folder / "run")


def repair_meta(path: Path) -> None:
    """Make the digest of what a step says of itself right again, as far as it is JSON."""
    with contextlib.suppress(Exception):
        meta = json.loads(path.read_text())
        meta["digests"]["meta"] = meta_digest(meta)
        path.write_text(json.dumps(meta))


META = "checkpoints/3/meta/metadata"


def read_card(path: Path) -> object:
    finish(path.parent)
    return path


READERS["run"] = Reader(write_run, load)
READERS["meta"] = Reader(
    lambda folder: write_run(folder) / META, lambda path: load(path.parents[3]).sampler_options(), repair_meta
)
READERS["card"] = Reader(lambda folder: write_run(folder) / "card.json", read_card)


# Weights: the autoencoder


@functools.cache
def autoencoder_files() -> dict[str, bytes]:
    options = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
    shapes = nnx.eval_shape(lambda: AutoencoderKL(**options, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nnx.to_pure_dict(nnx.split(shapes)[1]))
    tensors = {name: np.ascontiguousarray(x) for name, x in autoencoder.to_torch(params).items()}
    config = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4}
    config |= {"scaling_factor": 0.25, "act_fn": "silu", "sample_size": 256} | options
    with tempfile.TemporaryDirectory() as name:
        save_file(tensors, Path(name) / "diffusion_pytorch_model.safetensors")
        (Path(name) / "config.json").write_text(json.dumps(config))
        return content_of(Path(name))


READERS["autoencoder"] = Reader(lambda folder: copy_of(autoencoder_files(), folder / "vae"), load_autoencoder)


# Weights: Inception's, of a network of one layer of each kind


class TinyInception(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.fc = Conv(3, 2, 3, rngs=rngs), nnx.Linear(2, 4, rngs=rngs)


def write_inception(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"first.bn.{name}": np.ones(2, np.float32) for name in inception._NORM}
    tensors |= {"first.conv.weight": np.zeros((2, 3, 3, 3), np.float32), "fc.bias": np.zeros(4, np.float32)}
    tensors |= {"fc.weight": np.zeros((4, 2), np.float32)}
    save_file(tensors, folder / "in.safetensors")
    return folder / "in.safetensors"


def read_inception(path: Path) -> object:
    shapes = nnx.split(nnx.eval_shape(lambda: TinyInception(nnx.Rngs(0))))[1]
    return inception.read_weights(path, nnx.to_pure_dict(shapes))


READERS["inception"] = Reader(write_inception, read_inception)


# Sets of samples


def write_samples(folder: Path) -> Path:
    path, images = folder / "in", np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
    path.mkdir(parents=True)
    np.savez(path / "samples.npz", arr_0=images, arr_1=np.arange(3, dtype=np.int32))
    about = {"format": 1, "num_samples": 3, "image_shape": [8, 8, 3], "dtype": "uint8", "finished": True}
    (path / "samples.json").write_text(json.dumps(about | {"seeds": "0-2", "labels": "random"}))
    return path


def write_sample_images(folder: Path) -> Path:
    path = write_samples(folder)
    (path / "samples.npz").unlink()
    (path / "000000").mkdir()
    for seed in range(3):
        save_png(path / f"000000/{seed:06d}.png", np.full((8, 8, 3), seed, np.uint8))
    return path


def read_samples(path: Path) -> object:
    return [batch.sum() for batch in open_samples(path).read(2)]


def write_features(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "in.npz", features=np.eye(3, 4))
    return folder / "in.npz"


READERS["features"] = Reader(write_features, lambda path: [x.sum() for x in open_features(path).read(2)])
READERS["samples"] = Reader(write_samples, read_samples)
READERS["sample images"] = Reader(write_sample_images, read_samples, repair_images)


# A configuration, whose mistakes tests/test_config_file.py has by hand


def write_config(folder: Path) -> Path:
    path = folder / "mine.py"
    folder.mkdir(exist_ok=True)
    path.write_bytes((ROOT / "configs" / "digits.py").read_bytes())
    return path


READERS["config"] = Reader(write_config, lambda path: resolve(load_config(str(path)), device_count=1))


# A reference of real images


def write_reference_file(folder: Path) -> Path:
    """Five images of four values each, with their features."""
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 2, 1), np.uint8)
    folder.mkdir(exist_ok=True)
    write_reference(folder / "ref.npz", make_reference([images], 5, PIXELS, origin="test"))
    return folder / "ref.npz"


READERS["reference"] = Reader(write_reference_file, read_reference, repair_zip)
