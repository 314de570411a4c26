"""Command: images or latents from a run folder.

An image depends on the weights, its seed, its label and the options only, not on the devices or processes.
All processes of the command sample; each image is written by one of them. Stopped at any moment, the same
command makes the images that are missing.
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path

from maskdit_jax.api import load
from maskdit_jax.diffusion.solvers import SamplerOptions
from maskdit_jax.distributed.hosts import add_flags, joined, shared_flags
from maskdit_jax.errors import Parser, UserError
from maskdit_jax.log import log, log_to_stdout
from maskdit_jax.models.compute import PRECISIONS
from maskdit_jax.options import each_option
from maskdit_jax.sample_files import write_samples
from maskdit_jax.seeds import parse_integers, parse_labels
from maskdit_jax.training.agreement import agree, check_same_folder, this_process
from maskdit_jax.training.meta import WEIGHTS


def main(arguments: list[str] | None = None) -> None:
    """Parse flags, load the model, write samples."""
    parser = Parser("python -m maskdit_jax.sample", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--seeds", default="0-63", help="such as 0-49999 or 3,5,7-9")
    parser.add_argument(
        "--labels",
        help="balanced (seed mod classes, the default), random (drawn from the seed), one class by number or "
        "name, or one for each seed",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="images of one call on each device")
    parser.add_argument("--weights", choices=WEIGHTS, default="ema", help="the EMA, or the raw weights")
    parser.add_argument("--step", type=int, help="of the run's checkpoints; default: the newest")
    parser.add_argument(
        "--weak", help="run folder of the model to guide away from, in place of no class (autoguidance)"
    )
    parser.add_argument("--weak_step", type=int, help="of its checkpoints; default: the newest")
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
        paths = {"--workdir": flags.workdir, "--out": flags.out, "--weak": flags.weak}
        folders = {name: path and os.path.realpath(path) for name, path in paths.items()}
        agree({"the command": "sample"} | this_process() | shared_flags(flags) | folders)
        check_same_folder("--out", flags.out)
        _sample(flags)


def _sample(flags: argparse.Namespace) -> None:
    """What the flags ask for, with one line at the end."""
    model = load(flags.workdir, flags.weights, step=flags.step, precision=flags.precision, vae=flags.vae)
    weak = None
    if flags.weak is not None:
        weak = load(flags.weak, flags.weights, step=flags.weak_step, precision=flags.precision, vae=flags.vae)
    elif flags.weak_step is not None:
        raise UserError(f"--weak_step={flags.weak_step} needs --weak=FOLDER, whose step it is")
    options = {f.name: getattr(flags, f.name) for f in dataclasses.fields(SamplerOptions)}
    options = {name: value for name, value in options.items() if value is not None}
    if flags.guidance_interval is not None:
        options["guidance_interval"] = _parse_interval(flags.guidance_interval)
    labels = None if flags.labels is None else parse_labels(flags.labels, model.class_names)
    started = time.monotonic()
    about = write_samples(
        model,
        flags.out,
        parse_integers("--seeds", flags.seeds),
        labels,
        formats=flags.format.split(",") if flags.format is not None else None,
        batch_size=flags.batch_size,
        weak=weak,
        **options,
    )
    guided = f" at cfg_scale {about['sampler']['cfg_scale']:g}" * (about["sampler"]["cfg_scale"] != 1)
    log.info(
        f"{about['num_samples']:,} samples of step {about['step']:,} in {flags.out}, labels "
        f"{about['labels']}, {about['nfe']} network calls each{guided}; {time.monotonic() - started:.1f} s"
    )


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
