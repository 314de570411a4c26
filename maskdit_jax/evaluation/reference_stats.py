"""References made by command: of a source of data, a folder of images, or a file in ADM's layout."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskdit_jax.data.codec import Codec
from maskdit_jax.data.images import to_uint8
from maskdit_jax.data.sources import SOURCES, Augmentation, Digits, LatentShards, Source, parse_digits
from maskdit_jax.data.vae import load_autoencoder
from maskdit_jax.errors import UserError
from maskdit_jax.evaluation.real import BATCH_SIZE, Real, images_of, open_extractor
from maskdit_jax.evaluation.reference import Reference, make_reference, write_reference
from maskdit_jax.evaluation.sample_set import open_samples
from maskdit_jax.log import log
from maskdit_jax.methods.method import Shape

SECONDS_BETWEEN_REPORTS = 10


class Images(NamedTuple):
    """Images uint8 [B, H, W, C] in batches, how many of them, and where they are from."""

    batches: Iterator[np.ndarray]
    total: int
    origin: str


def save_reference(
    out: Path,
    *,
    source: str = "",
    images: str = "",
    image_size: int = 0,
    vae: str = "",
    held_out: bool = False,
    features: str = "inception",
    inception: str = "",
    num_kept: int = 10_000,
    seed: int = 0,
    num_threads: int = 4,
) -> Reference:
    """Write the reference of some images to the file `out`.

    Args:
      source: digits, folder:PATH, tfds:NAME or latents:FOLDER, as data.source; those of folder: and tfds:
        are cropped to `image_size` as training does, latents decoded by the autoencoder `vae`.
      images: instead, a folder of images of one size, or an npz with arr_0; they are taken as they are.
      held_out: of digits the 360 that no run is trained on.
      features: pixels or inception, then with the file of its weights.
      num_kept: so many images, drawn by the seed, are kept with their features, for metrics that need them.

    Raises:
      UserError: the images, the weights or the autoencoder are not there, or do not fit.
    """
    if bool(source) == bool(images):
        raise UserError("give either a source or images")
    if num_kept < 0:
        raise UserError(f"num_kept={num_kept} must not be negative")
    if features == "inception" and not inception:
        raise UserError("features='inception' needs inception, the file of its weights")
    out.parent.mkdir(parents=True, exist_ok=True)  # now, not after an hour
    extractor = open_extractor(features, inception)
    if source:
        found = _of_source(source, image_size, vae, held_out, num_threads)
    else:
        found = _of_files(images)
    reference = make_reference(
        _reported(found), found.total, extractor, num_kept=num_kept, seed=seed, origin=found.origin
    )
    write_reference(out, reference)
    parts = ", ".join(f"{len(mean):,} {part} features" for part, (mean, _) in reference.moments.items())
    kept = 0 if reference.features is None else len(reference.features)
    log.info(f"wrote {out}: {found.total:,} images of {found.origin}, {parts} by {features}, {kept:,} kept")
    return reference


def _of_files(path: str) -> Images:
    found = open_samples(path)
    batches = (x if x.dtype == np.uint8 else to_uint8(x) for x in found.read(BATCH_SIZE))
    return Images(batches, found.count, path)


def _of_source(name: str, image_size: int, vae: str, held_out: bool, num_threads: int) -> Images:
    kind = name.partition(":")[0]
    if kind not in SOURCES:
        looks = ", ".join(kind.looks for kind in SOURCES.values())
        raise UserError(f"source={name!r} is unknown; known: {looks}")
    if held_out and kind != "digits":
        raise UserError(f"held_out is for digits; all images of {name} are of the training")
    source: Source
    codec = Codec("pixels", 1.0)
    if kind == "digits":
        source = Digits("held_out" if held_out else "train", *parse_digits(name))
    elif kind == "latents":
        if not vae:
            raise UserError(f"source={name!r}: give vae, the autoencoder that makes images of latents")
        autoencoder = load_autoencoder(vae)
        # One draw of cached moments is as good as another; the scale cancels.
        source, codec = LatentShards(name.partition(":")[2]), Codec("latents", 1.0, autoencoder)
        if source.shape.channels != autoencoder.channels:
            raise UserError(
                f"vae: the autoencoder's latents have {autoencoder.channels} channels, those of {name} "
                f"{source.shape.channels}"
            )
    else:
        if image_size < 1:
            raise UserError(f"source={name!r}: give image_size, to which its images are cropped")
        unaugmented = Augmentation(seed=0, flip=False, max_zoom=1.0)
        source = SOURCES[kind].open(name, Shape(image_size, 3, 0), unaugmented)
    real = Real(source, np.arange(len(source)), name + ", held out" * held_out)
    batches = (to_uint8(x) for x, _ in images_of(real, codec, num_threads=num_threads))
    return Images(batches, len(source), real.origin)


def _reported(found: Images) -> Iterator[np.ndarray]:
    started = told = time.monotonic()
    count = 0
    for batch in found.batches:
        yield batch
        count += len(batch)
        now = time.monotonic()
        if now - told > SECONDS_BETWEEN_REPORTS:
            told = now
            log.info(f"{count:,}/{found.total:,} images · {count / (now - started):,.0f} images/s")
