"""Cached autoencoder moments on disk, and the latents drawn from them.

A folder of moments holds `metadata.json` and shards of fixed-size records, one record per image with
the moments of the image and of its mirror image. To open a shard with numpy alone:

    meta = json.load(open("metadata.json"))
    shape = (2, meta["image_size"], meta["image_size"], 2 * meta["channels"])
    record = np.dtype([("label", "<i4"), ("moments", meta["dtype"], shape)])
    shard = np.memmap(meta["shards"][0]["file"], record, "r")
    shard[7]["moments"]          # [image or mirror image, H, W, (mean, logvar)]
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from maskdit_jax.errors import UserError
from maskdit_jax.files import appears_whole

METADATA = "metadata.json"


def draw_latents(moments: jax.Array, noise: jax.Array, latent_scale: float) -> jax.Array:
    """latents = latent_scale·(mean + exp(logvar / 2)·noise), logvar clipped to [-30, 20]; float32.

    moments [B, H, W, 2C] are mean and log-variance of the autoencoder's posterior; noise [B, H, W, C].
    """
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return latent_scale * (mean + jnp.exp(0.5 * jnp.clip(logvar, -30, 20)) * noise)


def record_dtype(image_size: int, channels: int, dtype: str) -> np.dtype:
    """Layout of one record: the label, then the moments of the image and of its mirror image."""
    shape = (2, image_size, image_size, 2 * channels)
    return np.dtype([("label", "<i4"), ("moments", dtype, shape)])


def open_shards(folder: str) -> tuple[dict, list[np.memmap]]:
    """Metadata and memory-mapped shards of a folder of moments.

    Raises:
      UserError: the folder is missing, or a shard has the wrong size.
    """
    path = Path(folder)
    if not (path / METADATA).is_file():
        raise UserError(
            f"data.source: no latents in {folder!r} ({METADATA} is missing); make them with "
            f"python tools/encode_latents.py --source=tfds:imagenet2012 --vae=DIR --out={folder}"
        )
    try:
        metadata = json.loads((path / METADATA).read_text())
        record = record_dtype(metadata["image_size"], metadata["channels"], metadata["dtype"])
        listed = [(path / shard["file"], shard["num_records"]) for shard in metadata["shards"]]
        missing = {"image_size", "channels", "num_classes"} - set(metadata)
        if missing:
            raise KeyError(*missing)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.source: {path / METADATA} is damaged: {error!r}") from error
    shards = []
    for file, num_records in listed:
        expected = num_records * record.itemsize
        size = file.stat().st_size if file.is_file() else 0
        if size != expected:
            raise UserError(f"data.source: {file} has {size} bytes, expected {expected}")
        shards.append(np.memmap(file, record, "r"))
    return metadata, shards


def write_shards(
    folder: str, moments: np.ndarray, labels: np.ndarray, *, num_classes: int, shard_size: int
) -> None:
    """Write moments [n, 2, H, W, 2C] (image, mirror image) and labels [n] as a folder of moments."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    count, _, image_size, _, channels2 = moments.shape
    record = record_dtype(image_size, channels2 // 2, moments.dtype.str)
    shards = []
    for start in range(0, count, shard_size):
        name = f"shard-{len(shards):05d}-of-{math.ceil(count / shard_size):05d}.bin"
        records = np.empty(min(shard_size, count - start), record)
        records["label"] = labels[start : start + shard_size]
        records["moments"] = moments[start : start + shard_size]
        records.tofile(path / name)
        shards.append({"file": name, "num_records": len(records)})
    metadata = {
        "image_size": image_size,
        "channels": channels2 // 2,
        "num_classes": num_classes,
        "dtype": moments.dtype.str,
        "moments": "mean, logvar",
        "shards": shards,
    }
    # Last and in one rename, so that a folder with metadata is a complete one.
    with appears_whole(path / METADATA) as partial:
        partial.write_text(json.dumps(metadata, indent=1))
