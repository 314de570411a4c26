"""One side of a comparison in a process of its own: python -m maskdit_jax.benchmark.worker

On standard input a line of JSON says what the side is, and each further line is a block: {"steps": 10}, and
for torch {"steps": 10, "form": "eager"}. It answers each with a line: what it is, what the block took, or
{"error": …}. A side computes with its own library only.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from maskdit_jax.benchmark.turns import Usage, measured
from maskdit_jax.errors import UserError, first_line

WARM_UP_STEPS = 3
# JAX takes three quarters of a GPU by itself.
MOST_OF_THE_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"}
Block = Callable[..., None]  # run(steps), for torch run(steps, form)
Served = tuple[dict[str, Any], Block, Callable[[], int]]


class Worker:
    """The parent's end. `about` is what the side says of itself; `block` runs one; `peak_bytes` is of all.

    Raises:
      UserError: what the side said, or that it ended without a word.
    """

    def __init__(self, name: str, spec: dict[str, Any], *, share: bool = False, platform: str = ""):
        """share: with another process on the same GPU; platform: of JAX, where not the best there is."""
        self.name, self.peak_bytes = name, 0
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if share else MOST_OF_THE_MEMORY
        chosen = {"JAX_PLATFORMS": platform} if platform else {}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed by `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "maskdit_jax.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=memory | os.environ | chosen,
        )
        self.about = self._ask(spec)

    def block(self, steps: int, *, warm_up: int = 0, **what: Any) -> Usage:
        """So many steps, measured by the side itself, after others that are not."""
        if warm_up:
            self._ask({"steps": warm_up} | what)
        answer = self._ask({"steps": steps} | what)
        self.peak_bytes = answer["peak_bytes"]
        return Usage(*answer["usage"])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise UserError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "no message")
        return f"its process ended with exit code {self._process.returncode}: {said}"


@contextlib.contextmanager
def workers(specs: dict[str, dict[str, Any]], *, share: bool = False) -> Iterator[dict[str, Worker]]:
    """A process for each of some sides by name, started one after the other; all end with the block."""
    started: dict[str, Worker] = {}
    with contextlib.ExitStack() as stack:
        for name, spec in specs.items():
            started[name] = Worker(name, spec, share=share)
            stack.callback(started[name].close)
        yield started


def serve(spec: dict[str, Any]) -> Served:
    """Of the side of `spec`: what it is, its blocks, and its peak memory in bytes."""
    return SIDES[spec.pop("side")](spec)


def _our_side(spec: dict[str, Any]) -> Served:
    from maskdit_jax.benchmark.against_torch import torch_options
    from maskdit_jax.benchmark.memory import allocator_peak, process_peak
    from maskdit_jax.benchmark.side import Side

    for_torch = spec.pop("torch_options", False)
    side = Side(**spec)
    options = {"torch_options": torch_options(side.resolved())} if for_torch else {}
    run = side.start()
    run.run(1 if side.sampling else WARM_UP_STEPS)
    return run.about() | options, run.run, lambda: allocator_peak() or process_peak()


def _torch_side(spec: dict[str, Any]) -> Served:
    import torch

    from maskdit_jax.benchmark.memory import process_peak
    from maskdit_jax.benchmark.torch_step import TorchTraining

    options, device = spec["options"], "cuda" if torch.cuda.is_available() else "cpu"
    half = device == "cuda" and options["precision"] == "bfloat16"
    torch.set_float32_matmul_precision("highest" if options["precision"] == "float32" else "high")
    torch.manual_seed(0)
    training, data = TorchTraining(options, device, half=half), options["data"]
    shape = (options["batch_size"], data["channels"], data["image_size"], data["image_size"])
    clean = torch.randn(shape, device=device) * options["method"]["sigma_data"]
    labels = torch.randint(0, max(data["num_classes"], 1), shape[:1], device=device)

    def run(steps: int, form: str) -> None:
        for _ in range(steps):
            training.step(clean, labels, form)
        if device == "cuda":
            torch.cuda.synchronize()

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else process_peak()

    about = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in training.params),
        "batch_size": options["batch_size"],
    }
    for form in spec["forms"]:
        run(WARM_UP_STEPS, form)
    return about, run, peak


def _parity_side(spec: dict[str, Any]) -> Served:
    from maskdit_jax.benchmark.parity import write_outputs

    return write_outputs(spec["precision"], spec["small"], Path(spec["folder"])), _no_blocks, lambda: 0


def _compare_side(spec: dict[str, Any]) -> Served:
    from maskdit_jax.benchmark.compare import compare
    from maskdit_jax.benchmark.side import Side

    sides = {name: Side(**side) for name, side in spec["sides"].items()}
    return compare(sides, rounds=spec["rounds"], steps=spec["steps"]), _no_blocks, lambda: 0


def _ceiling_side(spec: dict[str, Any]) -> Served:
    from maskdit_jax.benchmark.ceiling import describe_device

    return describe_device(), _no_blocks, lambda: 0


def _no_blocks(steps: int) -> None:
    """Of a side that is all said when it has started."""


SIDES: dict[str, Callable[[dict[str, Any]], Served]] = {
    "ours": _our_side,
    "torch": _torch_side,
    "parity": _parity_side,
    "compare": _compare_side,
    "ceiling": _ceiling_side,
}


def main() -> None:
    # What libraries print goes elsewhere: standard output is the parent's.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        about, run, peak = serve(json.loads(sys.stdin.readline()))
        say(about)
        for line in sys.stdin:
            block = json.loads(line)
            steps = block.pop("steps")
            say({"usage": measured(functools.partial(run, **block), steps), "peak_bytes": peak()})
    except Exception as error:  # whatever it is, the parent says it
        say({"error": first_line(error)})
        raise


if __name__ == "__main__":
    main()
