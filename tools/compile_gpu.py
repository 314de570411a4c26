"""A config's training step, or sampler, compiled for a GPU that is not there: memory, traffic, kernels.

Needs the wheels of JAX for CUDA, and no GPU: docs/performance.md.
"""

import json
from pathlib import Path
from typing import Any

from maskdit_jax.benchmark.for_gpu import GPUS, compile_for, prepare, topology_devices
from maskdit_jax.config import resolve
from maskdit_jax.config_file import load
from maskdit_jax.errors import Parser, UserError, one_line_errors


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, help="items per step, of all devices; default: the config's")
    parser.add_argument("--sampling", action="store_true", help="the sampler, for --batch images")
    parser.add_argument("--gpu", default="h200", help=f"kind: {', '.join(GPUS)} (default h200)")
    parser.add_argument("--devices", type=int, default=1, help="how many (default 1)")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--text", type=Path, help="file for the compiled program")
    flags, overrides = parser.parse_known_args()
    prepare()
    with one_line_errors():
        if flags.devices < 1:
            raise UserError(f"--devices={flags.devices} must be at least 1")
        for file in (flags.json, flags.text):
            if file and not file.parent.is_dir():
                raise UserError(f"{file}: there is no folder {file.parent}")
        config = load(
            flags.config, ["--config.compute.attention=cudnn", "--config.compute.unroll=full", *overrides]
        )
        if flags.batch is not None:
            config.training.batch_size = flags.batch
        config = resolve(config, device_count=flags.devices)
        devices = topology_devices(flags.gpu, flags.devices)
        result, program = compile_for(config, flags.gpu, devices, sampling=flags.sampling)
        text = json.dumps({"config": flags.config, "overrides": overrides} | result, indent=1)
        for file, content in ((flags.json, text), (flags.text, program)):
            if file:
                file.write_text(content)
        print(text)
        print(describe(result))


def describe(result: dict[str, Any]) -> str:
    """A line of what decides."""
    return (
        f"{result['temporary_mb_per_image']:,.1f} MB of temporaries, {result['traffic_gb_per_image']:.2f} GB "
        f"of traffic and {result['gflop_per_image']:,.1f} GFLOP an image; {result['attention_calls']} "
        f"attention calls, {result['gelu_epilogues']} GELU epilogues, {result['scatters']} scatters, "
        f"{result['loops']} loops"
    )


if __name__ == "__main__":
    main()
