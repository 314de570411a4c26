"""Quality over network calls, per solver: distance to the exact end of the path, and Fréchet distance."""

import json
from pathlib import Path

from maskdit_jax.api import load
from maskdit_jax.config import ConfigDict
from maskdit_jax.data.sources import Digits, parse_digits
from maskdit_jax.diffusion.solvers import MAX_STEPS
from maskdit_jax.distributed.hosts import check_devices
from maskdit_jax.errors import Parser, UserError, one_line_errors
from maskdit_jax.evaluation.solver_comparison import compare_solvers
from maskdit_jax.files import appears_whole
from maskdit_jax.log import log_to_stdout
from maskdit_jax.sampling import Model
from maskdit_jax.seeds import parse_integers


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--step", type=int, help="of its checkpoints; default: the newest")
    parser.add_argument("--solvers", default="heun,euler,dpmpp_2m", help="with commas between them")
    parser.add_argument("--calls", default="8,12,16,20,28,40,56,79", help="network calls, at most")
    parser.add_argument("--seeds", type=int, default=256, help="of the distance")
    parser.add_argument("--frechet", type=int, default=0, help="samples of the Fréchet distance; 0: none")
    parser.add_argument("--cfg_scale", type=float, default=1.0, help="guidance; 1: none")
    parser.add_argument("--rho", type=float, default=7.0, help="the larger, the more noise levels are low")
    parser.add_argument("--batch_size", type=int, default=512, help="images of one call on all devices")
    parser.add_argument("--json", type=Path, help="file for the result")
    flags = parser.parse_args()
    log_to_stdout()
    with one_line_errors():
        check_devices()
        for name, least in (("seeds", 1), ("frechet", 0), ("batch_size", 1)):
            if getattr(flags, name) < least:
                raise UserError(f"--{name}={getattr(flags, name)} must be at least {least}")
        if flags.frechet == 1:
            raise UserError("--frechet=1 has no covariance; use 0, none, or at least 2")
        calls = parse_integers("--calls", flags.calls)
        if calls.min() < 1 or calls.max() > MAX_STEPS:
            raise UserError(f"--calls={flags.calls}: expected numbers from 1 to {MAX_STEPS:,}")
        model = _rolled(load(flags.workdir, step=flags.step))
        source, labels, real = model.config.data.get("source", ""), None, None
        if flags.frechet:
            if source.partition(":")[0] != "digits":
                raise UserError(f"--frechet={flags.frechet} is for data.source=digits; use 0")
            classes, count = parse_digits(source)
            labels, real = Digits("train", classes, count).labels, Digits("held_out", classes).images
        rows = compare_solvers(
            model,
            flags.solvers.split(","),
            [int(number) for number in calls],
            num_seeds=flags.seeds,
            labels=labels if model.shape.num_classes else None,
            real=real,
            num_frechet=flags.frechet,
            batch_size=flags.batch_size,
            cfg_scale=flags.cfg_scale,
            rho=flags.rho,
        )
        if flags.json:
            with appears_whole(flags.json) as partial:
                about = {"workdir": flags.workdir, "cfg_scale": flags.cfg_scale, "rho": flags.rho}
                partial.write_text(json.dumps(about | {"rows": rows}, indent=1))


def _rolled(model: Model) -> Model:
    """The same, its blocks in a loop: to compile many programs takes longer than to run each a few times."""
    config = ConfigDict(model.config.to_dict())
    config.compute.unroll = "none"
    return Model(config, model.params, model.mesh, model.codec, model.origin)


if __name__ == "__main__":
    main()
