"""Many samples into a folder: only those that are missing are made, by all processes, in bounded memory."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

import maskdit_jax
from maskdit_jax.data.images import contact_sheet, read_png, save_png, to_uint8
from maskdit_jax.distributed.digest import digest
from maskdit_jax.distributed.hosts import Refused, everywhere, from_first
from maskdit_jax.errors import UserError, shown
from maskdit_jax.evaluation.npz import Npz
from maskdit_jax.evaluation.sample_set import ABOUT, ARRAYS
from maskdit_jax.files import appears_whole, locked, read_json, remove
from maskdit_jax.interop import layout_of
from maskdit_jax.log import duration, log
from maskdit_jax.sampling import Model, check_batch_size, check_seeds
from maskdit_jax.seeds import as_ranges, choose_labels, parse_integers

GRID, PARTS = "grid.png", "parts"
FORMATS = ("png", "npz", "grid")
MAX_GRID = 400
PER_FOLDER = 1_000
_EVERY_S = 10.0  # between lines of progress
# Of the description these may change when a folder is gone on with.
_MAY_CHANGE = ("seeds", "num_samples", "finished", "versions")


def write_samples(
    model: Model,
    out: str | Path,
    seeds: ArrayLike,
    labels: str | int | Sequence[int] | Sequence[str] | np.ndarray | None = None,
    *,
    formats: Sequence[str] | None = None,
    batch_size: int = 16,
    weak: Model | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Sample every seed into the folder `out`; what is there already, of the same model and options, stays.

    Killed and called again it makes the images that are missing, and more seeds may be asked for. All
    processes of a run call it; each image is written by one of them. Memory is that of one batch.

    png: `out/SSSSSS/NNNNNN.png`, NNNNNN the seed, a folder for every 1,000. npz: `out/samples.npz` in the
    layout of ADM's evaluation, arr_0 [n, H, W, C] uint8 (of latents float32) and arr_1 [n] int32, the
    labels, in the order of the seeds, which are beside them. grid: `out/grid.png`, the first 400.
    `out/samples.json`, what is returned, says how they were made.

    Args:
      labels: "balanced" (the default: seed modulo the number of classes), "random" (drawn from the seed),
        one class for all, or one for each seed, by number or by the names that `model.class_names` has;
        -1 = no class.
      formats: of png, npz, grid; by default png and grid, of latents npz.
      batch_size: images of one call of the network on each device.
      weak: another model whose difference from `model` guides, as in `Model.sample`.
      **options: fields of `SamplerOptions`, as in `Model.sample`.

    Raises:
      UserError: an option, seed or label that does not exist, or `out` holds other samples.
    """
    out, formats = Path(out), _check_formats(formats, model.makes_pixels)
    check_batch_size(batch_size)
    seed_array = check_seeds(seeds).astype(np.int64)
    if len(np.unique(seed_array)) < len(seed_array):
        raise UserError("seeds: one stands there twice, but an image of a seed is one file")
    rule, label_array = choose_labels(model, seed_array, labels)
    about = _describe(model, weak, seed_array, label_array, rule, options)
    first = jax.process_index() == 0
    with locked(out) if first else contextlib.nullcontext():
        _check_same(out, about, seed_array)
        if first:
            _write_about(out, about)
        store = out if "png" in formats else out / PARTS
        found = _missing(store, seed_array, model.makes_pixels, out, formats) if first else []
        missing = from_first(found)
        _make(
            model,
            store,
            seed_array[missing],
            label_array[missing],
            len(seed_array),
            batch_size,
            weak,
            options,
        )
        everywhere(True)  # has written its images
        if first:
            _assemble(out, store, formats, seed_array, label_array, model.makes_pixels)
            about["finished"] = True
            _write_about(out, about)
    return about


def image_path(folder: Path, seed: int, suffix: str = ".png") -> Path:
    """Where the image of a seed lies."""
    return folder / f"{seed // PER_FOLDER * PER_FOLDER:06d}" / f"{seed:06d}{suffix}"


def _check_formats(formats: Sequence[str] | None, makes_pixels: bool) -> Sequence[str]:
    if formats is None:
        return ("png", "grid") if makes_pixels else ("npz",)
    text = ",".join(formats)
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"format={text}: {name!r} is unknown; known: {', '.join(FORMATS)}")
        if name != "npz" and not makes_pixels:
            raise UserError(
                f"format={text}: the model makes latents, which have no pixels; use npz, or an autoencoder "
                "(vae)"
            )
    return formats


def _describe(
    model: Model,
    weak: Model | None,
    seeds: np.ndarray,
    labels: np.ndarray,
    rule: str,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What `samples.json` holds."""
    chosen, layout = model.sampler_options(weak, **options), layout_of(model.config.method.name)
    pairs = np.stack([seeds, labels.astype(np.int64)])
    about = {
        "format": 1,
        "model": layout.model_name(model.method.network) if layout else model.config.method.name,
        **_weights_of(model),
        "weak": weak and _weights_of(weak),
        "precision": model.config.compute.precision,
        "vae": model.codec.autoencoder is not None,
        "sampler": dataclasses.asdict(chosen),
        "nfe": model.nfe(weak, **options),
        "seeds": as_ranges(seeds),
        "labels": rule,
        "given_labels": hashlib.sha256(pairs.tobytes()).hexdigest() if rule == "given" else "",
        "num_classes": model.shape.num_classes,
        "dtype": "uint8" if model.makes_pixels else "float32",
        "num_samples": len(seeds),
        "versions": {"maskdit_jax": maskdit_jax.__version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
        "finished": False,
    }
    return json.loads(json.dumps(about))  # as it will be read back


def _weights_of(model: Model) -> dict[str, Any]:
    origin = model.origin
    return {
        "workdir": str(origin.workdir) if origin else "",
        "step": origin.step if origin else 0,
        "weights": origin.weights if origin else "params",
        "weights_digest": digest(model.params),
    }


def _check_same(out: Path, about: dict[str, Any], seeds: np.ndarray) -> None:
    """Refuse to go on in a folder whose samples were made in another way."""
    problem, begun = "", (out / ABOUT).exists()
    if jax.process_index() == 0 and not begun and any(out.glob("[0-9]*/[0-9]*.png")):
        problem = f"{out} holds images, and no {ABOUT} that says how they were made"
    elif jax.process_index() == 0 and begun:
        before = read_json(out / ABOUT)
        # A run folder that was moved is the same run: its weights are compared.
        same_weights = before.get("weights_digest") == about["weights_digest"]
        skipped = (*_MAY_CHANGE, "workdir") if same_weights else _MAY_CHANGE
        differences = _differences(before, {k: v for k, v in about.items() if k not in skipped})
        if differences:
            problem = f"{out} holds samples made in another way: {'; '.join(differences[:4])}"
        elif not np.isin(parse_integers(str(out / ABOUT), str(before.get("seeds"))), seeds).all():
            problem = f"{out} holds samples of the seeds {shown(before['seeds'])}, more than those asked for"
    if problem := from_first(problem):
        raise Refused(f"{problem}; choose another folder, or remove it")


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            found += _differences(old, value, f"{prefix}{name}.")
        elif old != value:
            found.append(f"{prefix}{name}={shown(old)} there, {shown(value)} now")
    return found


def _write_about(out: Path, about: dict[str, Any]) -> None:
    with appears_whole(out / ABOUT) as partial:
        partial.write_text(json.dumps(about, indent=1))


def _missing(
    store: Path, seeds: np.ndarray, makes_pixels: bool, out: Path, formats: Sequence[str]
) -> list[int]:
    """Places in `seeds` whose image is not yet there; those of earlier arrays are put where images belong."""
    earlier = _earlier_arrays(out / ARRAYS)
    if earlier is not None:
        with earlier:
            kept = earlier.read("seeds")
            if set(formats) == {"npz"} and np.array_equal(kept, seeds):
                return []
            rows = itertools.chain.from_iterable(earlier.batches("arr_0", PER_FOLDER))
            for seed, image in zip(kept, rows):
                _write_image(image_path(store, int(seed), _suffix(makes_pixels)), image)
    suffix = _suffix(makes_pixels)
    folders = {image_path(store, int(seed)).parent for seed in seeds}
    there = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
    return [i for i, seed in enumerate(seeds) if image_path(store, int(seed), suffix) not in there]


def _earlier_arrays(path: Path) -> Npz | None:
    """The arrays that an earlier call has written, if they are sound."""
    if not path.exists():
        return None
    try:
        arrays = Npz(path)
        if arrays.member("seeds").shape == arrays.member("arr_0").shape[:1]:
            return arrays
        problem: object = "as many seeds as images were expected"
    except UserError as error:
        problem = error
    log.warning(f"warning: passed over: {path}: {problem}")
    return None


def _suffix(makes_pixels: bool) -> str:
    return ".png" if makes_pixels else ".npy"


def _write_image(path: Path, image: np.ndarray) -> None:
    """One image, whole or not at all; one that is there stays."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with appears_whole(path) as partial:
        if path.suffix == ".png":
            save_png(partial, image)
        else:
            with partial.open("wb") as file:  # of a name, numpy would make another
                np.save(file, image)


def _make(
    model: Model,
    store: Path,
    seeds: np.ndarray,
    labels: np.ndarray,
    total: int,
    batch_size: int,
    weak: Model | None,
    options: dict[str, Any],
) -> None:
    """Sample and write, batch by batch, each process its share of every batch."""
    process, count, at_once = jax.process_index(), jax.process_count(), batch_size * model.mesh.size
    there, started, said = total - len(seeds), time.monotonic(), time.monotonic()
    if there:
        log.info(f"{there:,} of {total:,} samples are there already")
    for start in range(0, len(seeds), at_once):
        part = slice(start, start + at_once)
        samples = model.sample(seeds[part], labels[part], batch_size=batch_size, weak=weak, **options)
        if model.makes_pixels:
            samples = to_uint8(samples)
        for seed, sample in list(zip(seeds[part], samples, strict=True))[process::count]:
            _write_image(image_path(store, int(seed), _suffix(model.makes_pixels)), sample)
        now, done = time.monotonic(), min(start + at_once, len(seeds))
        if now - said > _EVERY_S or done == len(seeds):
            speed, said = done / (now - started), now
            left = f" · {duration((len(seeds) - done) / speed)} left" if done < len(seeds) else ""
            log.info(f"{there + done:,}/{total:,} samples · {speed:,.1f} samples/s{left}")


def _assemble(
    out: Path,
    store: Path,
    formats: Sequence[str],
    seeds: np.ndarray,
    labels: np.ndarray,
    makes_pixels: bool,
) -> None:
    """Make of the images, one after the other, the file of arrays and the grid."""

    def images(count: int) -> Iterator[np.ndarray]:
        for seed in seeds[:count]:
            path = image_path(store, int(seed), _suffix(makes_pixels))
            yield read_png(path) if makes_pixels else np.load(path, allow_pickle=False)

    if set(formats) == {"npz"} and not store.exists():
        return  # finished by an earlier call
    if "npz" in formats:
        _write_arrays(out / ARRAYS, images(len(seeds)), seeds, labels)
    if "grid" in formats:
        first = np.stack(list(images(MAX_GRID)))
        with appears_whole(out / GRID) as partial:
            save_png(partial, contact_sheet(first, columns=round(len(first) ** 0.5)))
    remove(out / PARTS)


def _write_arrays(path: Path, images: Iterator[np.ndarray], seeds: np.ndarray, labels: np.ndarray) -> None:
    """What `np.savez` would write of all images at once, without ever holding them."""
    with appears_whole(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        first = next(images)
        header = {
            "shape": (len(seeds), *first.shape),
            "fortran_order": False,
            "descr": np.lib.format.dtype_to_descr(first.dtype),
        }
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for image in itertools.chain([first], images):
                file.write(image.tobytes())
        for name, values in (("arr_1", labels.astype(np.int32)), ("seeds", seeds.astype(np.uint32))):
            with archive.open(f"{name}.npy", "w") as file:
                np.save(file, values)
