"""Real data to compare samples with: which items of a source, as the extractor of features wants them."""

from collections.abc import Iterator
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from maskdit_jax.config import FEATURES, ConfigDict, Evaluation, evaluation_of, shape_of
from maskdit_jax.data.codec import Codec
from maskdit_jax.data.sources import Batch, Digits, Source, open_source, parse_digits
from maskdit_jax.distributed.mesh import batch_sharding, make_mesh, repeat_to, to_host, to_mesh
from maskdit_jax.errors import UserError
from maskdit_jax.evaluation import features
from maskdit_jax.evaluation.features import Extractor
from maskdit_jax.evaluation.reference import Reference, make_reference, read_reference
from maskdit_jax.sampling import Model

MAX_ITEMS = 10_000  # of either half of a source
BATCH_SIZE = 256


class Real(NamedTuple):
    """Items [n] of a source, and what they are, in words."""

    source: Source
    items: np.ndarray
    origin: str


class RealData(NamedTuple):
    """What samples of a run are compared with.

    held_out: the reference; training: what a perfect model would make, of the same classes; seen: images of
    the training, of which samples might be copies; labelled: what a classifier learns from. Nothing of
    `held_out` is in the others.
    """

    held_out: Real
    training: Real
    seen: Real
    labelled: Real


def real_data(config: ConfigDict) -> RealData:
    """Of digits the split that no run is trained on; of other sources two halves, drawn by the seed.

    Images are cropped at the centre, whatever the run does with them. A half is at most MAX_ITEMS items.

    Raises:
      UserError: the data are not there, do not fit, or are fewer than 4 items.
    """
    name = config.data.source
    if name.partition(":")[0] == "digits":
        classes, count = parse_digits(name)
        kind = "digits" if len(classes) == 10 else f"digits {classes[0]}-{classes[-1]}"
        return RealData(
            _all(Digits("held_out", classes), f"the held-out {kind}"),
            _all(Digits("train", classes), f"the training {kind}"),
            _all(Digits("train", classes, count), name),
            _all(Digits("train"), "all training digits"),
        )
    source = open_source(name, shape_of(config), space=config.data.space)
    half = min(len(source) // 2, MAX_ITEMS)
    if half < 2:
        raise UserError(f"evaluation: {name} has {len(source)} items, too few to compare samples with")
    order = np.random.default_rng(config.seed).permutation(len(source))
    drawn = [
        Real(source, np.sort(items), f"{half:,} of the {len(source):,} training items of {name}")
        for items in (order[:half], order[half : 2 * half])
    ]
    return RealData(drawn[0], drawn[1], drawn[1], drawn[1])


def _all(source: Source, origin: str) -> Real:
    return Real(source, np.arange(len(source)), f"{origin} ({len(source):,})")


def images_of(real: Real, codec: Codec, *, num_threads: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images [B, H, W, C] float32, as the codec makes them of what a source gives, and labels [B]."""
    starts = range(0, len(real.items), BATCH_SIZE)

    def read(number: int) -> Batch:
        items = real.items[starts[number] : starts[number] + BATCH_SIZE]
        return real.source.read(items, items)

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    batches = grain.MapDataset.range(len(starts)).map(read).to_iter_dataset(options)
    for number, batch in enumerate(batches):
        labels = batch.pop("labels")
        # Filled up, so that there is one program.
        filled = {name: jnp.asarray(repeat_to(x, BATCH_SIZE)) for name, x in batch.items()}
        clean = np.asarray(codec.clean(filled, jax.random.fold_in(jax.random.key(0), number))["clean"])
        yield _decoded(clean, codec)[: len(labels)], labels


def _decoded(clean: np.ndarray, codec: Codec) -> np.ndarray:
    if codec.autoencoder is None:
        return clean
    mesh = make_mesh(jax.device_count(), 1)
    whole = repeat_to(clean, -(-len(clean) // mesh.size) * mesh.size)
    return to_host(codec.images(to_mesh(np.asarray(whole), batch_sharding(mesh))))[: len(clean)]


def features_of(
    real: Real, codec: Codec, extractor: Extractor, num_threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features [n, D] float32 and labels [n] of real items."""
    batches = images_of(real, codec, num_threads=num_threads)
    pooled, labels = zip(*((extractor.extract(images)["pool"], labels) for images, labels in batches))
    return np.concatenate(pooled), np.concatenate(labels)


def open_extractor(name: str, inception: str, space: str = "pixels") -> Extractor:
    """The extractor "inception", of that file of weights, or "pixels", the values of what is in that space.

    Raises:
      UserError: there is none of that name, or the file is not there, or another.
    """
    if name not in FEATURES:
        raise UserError(f"features={name!r} is unknown; known: {', '.join(FEATURES)}")
    if name == "inception":
        return features.inception(inception)
    return features.PIXELS if space == "pixels" else features.LATENTS


def open_reference(
    config: ConfigDict, held_out: Real, codec: Codec, extractor: Extractor
) -> tuple[Reference, np.ndarray | None]:
    """The reference file that a configuration names, or statistics of the held-out items and their labels.

    Raises:
      UserError: the file cannot be read, or has features of another kind.
    """
    evaluation = evaluation_of(config)
    if evaluation.reference:
        reference = read_reference(evaluation.reference)
        reference.check_extractor(extractor)
        return reference, None
    labels: list[np.ndarray] = []

    def images() -> Iterator[np.ndarray]:
        for batch, batch_labels in images_of(held_out, codec, num_threads=config.data.num_threads):
            labels.append(batch_labels)
            yield batch

    count, origin = len(held_out.items), held_out.origin
    reference = make_reference(images(), count, extractor, num_kept=0, origin=origin)
    return reference, np.concatenate(labels)


def compared_codec(codec: Codec, evaluation: Evaluation) -> Codec:
    """The codec of what is compared: features=pixels compares latents as the model makes them."""
    return codec if evaluation.features == "inception" else codec._replace(autoencoder=None)


def sample_batches(
    model: Model, labels: np.ndarray | None, count: int, cfg_scale: float
) -> Iterator[np.ndarray]:
    """Samples of the seeds 0 … count - 1 with labels [count], batch by batch."""
    values = int(np.prod(model.image_shape))
    on_each = min(max(2**15 // values, 16), -(-min(512, count) // model.mesh.size))
    for start in range(0, count, on_each * model.mesh.size):
        seeds = np.arange(start, min(start + on_each * model.mesh.size, count))
        chosen = None if labels is None else labels[seeds]
        yield model.sample(seeds, chosen, cfg_scale=cfg_scale, batch_size=on_each)
