"""Command: images or latents from a run folder.

An image depends on the weights, its seed, its label and the options only, not on the devices or processes.
All processes of the command sample; each image is written by one of them.
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path

import jax
import numpy as np

from maskdit_jax.api import load
from maskdit_jax.data.images import save_png, tile, to_uint8
from maskdit_jax.diffusion.solvers import SamplerOptions
from maskdit_jax.distributed.hosts import add_flags, joined, shared_flags
from maskdit_jax.errors import Parser, UserError, shown
from maskdit_jax.log import log, log_to_stdout
from maskdit_jax.models.compute import PRECISIONS
from maskdit_jax.options import each_option
from maskdit_jax.sampling import MAX_BATCH_SIZE, MAX_SEED, Model
from maskdit_jax.training.agreement import agree, check_same_folder, this_process
from maskdit_jax.training.checkpoint import WEIGHTS

FORMATS = ("png", "npz", "grid")
MAX_GRID = 400
MAX_NUMBERS = 10_000_000  # seeds of one command: 80 MB of them


def main(arguments: list[str] | None = None) -> None:
    """Parse flags, load the model, write samples."""
    parser = Parser("python -m maskdit_jax.sample", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--seeds", default="0-63", help="such as 0-49999 or 3,5,7-9")
    parser.add_argument("--labels", help="one class, or one for each seed; default: seed mod classes")
    parser.add_argument("--batch_size", type=int, default=16, help="images of one call on each device")
    parser.add_argument("--weights", choices=WEIGHTS, default="ema")
    parser.add_argument("--vae", help="autoencoder that makes pixels of latents: diffusers folder or .pth")
    parser.add_argument("--precision", choices=PRECISIONS, help="of compute; default: the run's")
    parser.add_argument("--format", help="of png,npz,grid; default: png,grid, of latents npz")
    parser.add_argument("--guidance_interval", help="LOW,HIGH: the noise levels that are guided")
    for name, field, kind in each_option(SamplerOptions):
        if name != "guidance_interval":
            parse = true_or_false if kind is bool else kind
            parser.add_argument(f"--{name}", type=parse, help=f"{field.metadata['help']}; default: the run's")
    add_flags(parser)
    flags = parser.parse_args(arguments)
    log_to_stdout()
    with joined(flags):
        # Paths as they are from here: each process may have been started in another folder.
        folders = {"--workdir": os.path.realpath(flags.workdir), "--out": os.path.realpath(flags.out)}
        agree({"the command": "sample"} | this_process() | shared_flags(flags) | folders)
        check_same_folder("--out", flags.out)
        model = load(flags.workdir, flags.weights, precision=flags.precision, vae=flags.vae)
        write_samples(model, flags)


def write_samples(model: Model, flags: argparse.Namespace) -> None:
    """Sample every seed of the flags and write the formats asked for."""
    formats = _parse_formats(flags.format, model.makes_pixels)
    seeds = parse_integers("--seeds", flags.seeds)
    labels = parse_integers("--labels", flags.labels) if flags.labels is not None else None
    if labels is not None and len(labels) == 1:
        labels = np.repeat(labels, len(seeds))
    labels = model.check_labels(seeds, labels)
    given = {f.name: getattr(flags, f.name) for f in dataclasses.fields(SamplerOptions)}
    given = {name: value for name, value in given.items() if value is not None}
    if flags.guidance_interval is not None:
        given["guidance_interval"] = _parse_interval(flags.guidance_interval)
    options = model.sampler_options(**given)
    if not 1 <= flags.batch_size <= MAX_BATCH_SIZE:
        raise UserError(f"--batch_size={flags.batch_size}: expected 1 … {MAX_BATCH_SIZE:,}")

    flags.out.mkdir(parents=True, exist_ok=True)
    kept, started = [], time.monotonic()
    process, at_once = jax.process_index(), flags.batch_size * model.mesh.size
    for start in range(0, len(seeds), at_once):
        part = slice(start, start + at_once)
        samples = model.sample(
            seeds[part], labels[part], batch_size=flags.batch_size, **dataclasses.asdict(options)
        )
        if model.makes_pixels:
            samples = to_uint8(samples)
        if "png" in formats:
            mine = slice(process, None, jax.process_count())
            for seed, image in zip(seeds[part][mine], samples[mine], strict=True):
                save_png(flags.out / f"{seed:06d}.png", image)
        if process == 0 and ("npz" in formats or start < MAX_GRID):
            kept.append(samples)
        log.info(f"{start + len(samples):,}/{len(seeds):,} samples")
    if "npz" in formats and process == 0:
        samples = np.concatenate(kept)
        np.savez(flags.out / "samples.npz", samples=samples, seeds=seeds, labels=labels)
    if "grid" in formats and process == 0:
        shown = np.concatenate(kept)[:MAX_GRID]
        save_png(flags.out / "grid.png", tile(shown, columns=round(len(shown) ** 0.5)))
    seconds = time.monotonic() - started
    calls = model.nfe(**dataclasses.asdict(options))
    guided = f", those of cfg_scale {options.cfg_scale:g} included" * (options.cfg_scale != 1)
    log.info(
        f"wrote {len(seeds):,} samples ({', '.join(formats)}) to {flags.out} in {seconds:.1f} s: "
        f"{len(seeds) / seconds:.1f} samples/s, {calls} network calls each{guided}"
    )


def parse_integers(flag: str, text: str) -> np.ndarray:
    """Integers [n] of a text such as "3,5,7-9"; -1 is allowed.

    Raises:
      UserError: the text is something else.
    """
    ranges = []
    try:
        for part in text.split(","):
            first, separator, last = part.strip().rpartition("-")
            start, end = (int(first), int(last)) if separator and first else (int(part), int(part))
            if end < start or abs(start) > MAX_SEED or end > MAX_SEED:
                raise ValueError
            ranges.append((start, end + 1))
    except ValueError:
        raise UserError(
            f"{flag}={shown(text)}: expected integers up to {MAX_SEED}, such as 0-49999 or 3,5,7-9"
        ) from None
    count = sum(end - start for start, end in ranges)
    if count > MAX_NUMBERS:
        raise UserError(f"{flag}={shown(text)}: {count:,} numbers; at most {MAX_NUMBERS:,} in one command")
    return np.concatenate([np.arange(start, end, dtype=np.int64) for start, end in ranges])


def _parse_formats(text: str | None, makes_pixels: bool) -> list[str]:
    default = "png,grid" if makes_pixels else "npz"
    formats = (text if text is not None else default).split(",")
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--format={text}: {name!r} is unknown; known: {', '.join(FORMATS)}")
        if name != "npz" and not makes_pixels:
            raise UserError(
                f"--format={text}: the model makes latents, which have no pixels; use npz, or --vae=DIR"
            )
    return formats


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _parse_interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--guidance_interval={text}: expected LOW,HIGH such as 0.3,5") from None
    return low, high


if __name__ == "__main__":
    main()
