"""Features in which sets of images are compared, by name and the hash of the weights behind them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from maskdit_jax.data.images import to_float, to_uint8
from maskdit_jax.distributed.mesh import (
    batch_sharding,
    make_mesh,
    repeat_to,
    to_host,
    to_mesh,
    whole_sharding,
)
from maskdit_jax.errors import UserError
from maskdit_jax.interop.inception import read_weights
from maskdit_jax.models.inception import InceptionV3, resize


class Extractor(NamedTuple):
    """What makes features of images.

    name, digest: "inception" or "pixels", and the sha256 of its weights, "" where there are none; both stand
    in reference files and cards, so that only like is compared with like.
    extract: images [B, H, W, C], uint8 or float32 in [-1, 1] as a model gives (or latents) → features by
    part, float32: "pool" [B, D] always, and where there are such "spatial" [B, S] and "logits" [B, K].
    parts: which of these there are.
    """

    name: str
    digest: str
    extract: Callable[[np.ndarray], dict[str, np.ndarray]]
    parts: tuple[str, ...] = ("pool",)


def _pixels(images: np.ndarray) -> dict[str, np.ndarray]:
    x = to_float(images) if images.dtype == np.uint8 else np.clip(images.astype(np.float32), -1, 1)
    return {"pool": x.reshape(len(x), -1)}


# The pixels themselves, clipped to the range that real ones have: for images as small as digits.
PIXELS = Extractor("pixels", "", _pixels)
# The same of latents, which have no such range.
LATENTS = Extractor("latents", "", lambda x: {"pool": x.reshape(len(x), -1).astype(np.float32)})


def inception(path: str | Path, batch_size: int = 32) -> Extractor:
    """The network of FID, sFID and the Inception score, on all devices (models/inception.py).

    It sees images as files have them, uint8: float32 images are rounded to it first, and grey ones get their
    only channel three times. In several processes each gives the same images and gets all features.

    Args:
      path: the weights, .pth or .safetensors.
      batch_size: images of one call on each device. The last call is filled up: there is one program for
        each size of images, and features of an image do not depend on those beside it.

    Raises:
      UserError: no such file (the message says where it is to be had), or another network's; from `extract`
        where the images are latents.
    """
    network = nnx.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(network)
    file = read_weights(path, nnx.to_pure_dict(shapes))
    mesh = make_mesh(jax.device_count(), 1)
    params = jax.tree.map(lambda x: to_mesh(x, whole_sharding(mesh)), file.params)
    at_once = batch_size * mesh.size

    def extract(images: np.ndarray) -> dict[str, np.ndarray]:
        parts = []
        for start in range(0, len(images), at_once):
            part = _as_rgb(images[start : start + at_once])
            batch = to_mesh(np.asarray(repeat_to(part, at_once)), batch_sharding(mesh))
            features = _apply(params, resize(batch.astype(jnp.float32)), graphdef=graphdef, mesh=mesh)
            parts.append({name: to_host(x)[: len(part)] for name, x in features.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return Extractor("inception", file.sha256, extract, ("pool", "spatial", "logits"))


def _as_rgb(images: np.ndarray) -> np.ndarray:
    images = images if images.dtype == np.uint8 else to_uint8(images)
    if images.shape[-1] not in (1, 3):
        raise UserError(
            f"Inception sees images of 3 channels or 1, these have {images.shape[-1]}: are they latents? "
            "Sample with --vae, which makes pixels of them"
        )
    return images if images.shape[-1] == 3 else images.repeat(3, axis=-1)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def _apply(params, images, *, graphdef, mesh):
    def on_one_device(params, images):
        return nnx.merge(graphdef, params)(images)

    batch, whole = batch_sharding(mesh).spec, PartitionSpec()
    return jax.shard_map(on_one_device, mesh=mesh, in_specs=(whole, batch), out_specs=batch)(params, images)
