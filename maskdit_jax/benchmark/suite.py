"""The one command for a new GPU: parity first, then speed and memory of everything, into one file.

Every case runs in processes of its own: one that runs out of memory, or kills its process, is recorded and
the next one begins with an empty device. The file is written whole after every case, and the same command
goes on with the cases that it does not have.
"""

import contextlib
import functools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskdit_jax.benchmark.against_torch import compare_with_torch
from maskdit_jax.benchmark.parity import NETWORKS, distances
from maskdit_jax.benchmark.table import as_markdown
from maskdit_jax.benchmark.turns import spread
from maskdit_jax.benchmark.worker import Worker
from maskdit_jax.errors import UserError, known
from maskdit_jax.files import appears_whole, read_json
from maskdit_jax.log import log
from maskdit_jax.models.compute import PRECISIONS

RECIPES = {"MaskDiT": "in256", "DiT": "in256_dit", "MDT": "in256_mdt"}
ROUNDS = 5
_TINY = ["size=custom", "hidden_size=32", "depth=1", "num_heads=4", "patch_size=2"]
TINY = {
    "MaskDiT": [*_TINY, "decoder_hidden_size=16", "decoder_depth=1", "decoder_num_heads=2"],
    "DiT": _TINY,
    "MDT": [*(x for x in _TINY if x != "depth=1"), "depth=2", "decoder_depth=1"],
}


class Scale(NamedTuple):
    """How large the cases are: seconds of measuring, latents of 256 and 512 px, batches, sampling steps."""

    seconds: float
    image_sizes: tuple[int, int]
    batches: tuple[int, ...]  # at 256 px, the first the most interesting
    batches_512: tuple[int, ...]
    equal: tuple[int, int]  # at which the methods take turns, at 256 and 512 px
    sampling: int
    sampling_steps: int


FULL = Scale(10, (32, 64), (256, 128, 512, 64), (128, 64, 32), (64, 16), 64, 40)
SMALL = Scale(0.1, (8, 16), (8, 4), (4,), (4, 2), 2, 2)


class Case(NamedTuple):
    """One measurement of a piece: run() gives what the file holds of it."""

    name: str
    run: Callable[[], dict[str, Any]]


def run_suite(file: Path, pieces: Sequence[str], *, small: bool, limit_s: float) -> dict[str, Any]:
    """Run the cases of some pieces that `file` lacks, while time is left; a table goes beside it, as .md.

    Raises:
      UserError: there is no such piece, or the file is of the other size.
    """
    for piece in pieces:
        if piece not in PIECES:
            raise UserError(f"--pieces: {piece!r} is unknown; known: {known(piece, PIECES, len(PIECES))}")
    result: Any = read_json(file) if file.exists() else {"small": small, "pieces": {}}
    if not isinstance(result, dict) or result.get("small") is not small:
        raise UserError(f"--suite={file} is of another size: name another file")
    started = time.monotonic()
    longest = 0.0
    cases = [(piece, case) for piece in pieces for case in PIECES[piece](SMALL if small else FULL, small)]
    left = [(p, case) for p, case in cases if case.name not in result["pieces"].get(p, {})]
    for number, (piece, case) in enumerate(left):
        before = time.monotonic()
        if before - started + longest > limit_s:
            log.info(f"{limit_s:g} s are over: {len(left) - number} cases left, the same command goes on")
            return result
        try:
            found = case.run()
        except UserError as error:
            found = {"failed": str(error)}
        took = time.monotonic() - before
        longest = max(longest, took)
        result["pieces"].setdefault(piece, {})[case.name] = found | {"took_s": took}
        for path, text in (
            (file, json.dumps(result, indent=1)),
            (file.with_suffix(".md"), as_markdown(result)),
        ):
            with appears_whole(path) as partial:
                partial.write_text(text)
        log.info(f"{piece}: {case.name}: {found.get('failed') or 'done'} ({took:.0f} s)")
    log.info(f"all {len(cases)} cases are in {file}, the table in {file.with_suffix('.md')}")
    return result


def _ours(
    method: str, scale: Scale, small: bool, *, px: int = 256, batch: int, **options: Any
) -> dict[str, Any]:
    """A side of `worker`: XL/2 of a method, or the tiny one."""
    options = {"data.image_size": scale.image_sizes[px == 512]} | options
    network = TINY[method] if small else ["size=XL/2"]
    overrides = [f"--config.method.network.{option}" for option in network]
    overrides += [f"--config.{name}={value}" for name, value in options.items()]
    return {"config": RECIPES[method], "overrides": overrides, "batch": batch}


def _measured(spec: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Blocks of a side alone in a process, of so many steps that all of them take about `seconds`."""
    with contextlib.closing(Worker("process", {"side": "ours", **spec})) as worker:
        about, trial = worker.about, worker.block(1)
        steps = min(max(round(seconds / ROUNDS / trial.wall_s), 1), 100)
        step_s = spread([worker.block(steps).wall_s for _ in range(ROUNDS)])
        images_per_s = about["batch_size"] / step_s.median
        return about | {
            "step_s": list(step_s),
            "steps": steps,
            "images_per_s": images_per_s,
            "flops_per_s": images_per_s * about["flops_per_image"],
            "peak_bytes": worker.peak_bytes,
        }


def _asked(spec: dict[str, Any], platform: str = "") -> dict[str, Any]:
    """What a process says that is started with `spec`, and then ends."""
    with contextlib.closing(Worker("process", spec, platform=platform)) as worker:
        return worker.about


def _ceiling(scale: Scale, small: bool) -> list[Case]:
    return [Case("device", lambda: _asked({"side": "ceiling"}))]


def _parity(scale: Scale, small: bool) -> list[Case]:
    return [Case(precision, lambda p=precision: _parity_of(p, small)) for precision in PRECISIONS]  # type: ignore[misc]


@functools.cache
def _reference(small: bool) -> tuple[Any, dict[str, Any]]:
    """The folder, which lives as long as this process, of what a CPU computes in float32; what it said."""
    folder = tempfile.TemporaryDirectory()
    spec = {"side": "parity", "small": small, "precision": "float32", "folder": folder.name}
    return folder, _asked(spec, platform="cpu")


def _parity_of(precision: str, small: bool) -> dict[str, Any]:
    """The networks of `parity` on the device, against float32 on the CPU."""
    expected, reference = _reference(small)
    with tempfile.TemporaryDirectory() as folder:
        said = _asked({"side": "parity", "small": small, "precision": precision, "folder": folder})
        whole = [n for n in NETWORKS if not any("failed" in x["networks"][n] for x in (said, reference))]
        far = distances(Path(folder), Path(expected.name), precision, whole)
    return {
        "device": said["device"],
        "networks": {n: reference["networks"][n] | said["networks"][n] | far.get(n, {}) for n in NETWORKS},
    }


def _steps(px: int) -> Callable[[Scale, bool], list[Case]]:
    def cases(scale: Scale, small: bool) -> list[Case]:
        batches = scale.batches_512 if px == 512 else scale.batches
        chosen = [("MaskDiT", batch) for batch in batches]
        chosen += [(method, batch) for method in ("DiT", "MDT") for batch in batches[:2]]
        return [
            Case(
                f"{method}, batch {batch}",
                lambda m=method, b=batch: _measured(_ours(m, scale, small, px=px, batch=b), scale.seconds),  # type: ignore[misc]
            )
            for method, batch in chosen
        ]

    return cases


def _compare(px: int) -> Callable[[Scale, bool], list[Case]]:
    def cases(scale: Scale, small: bool) -> list[Case]:
        batch = scale.equal[px == 512]
        sides = {method: _ours(method, scale, small, px=px, batch=batch) for method in RECIPES}
        spec = {"side": "compare", "sides": sides, "rounds": ROUNDS, "steps": 1 if small else 10}
        return [Case(f"batch {batch}", lambda: _asked(spec))]

    return cases


def _remat(scale: Scale, small: bool) -> list[Case]:
    return [
        Case(
            f"{remat}, batch {scale.batches[0]}",
            lambda r=remat: _measured(  # type: ignore[misc]
                _ours("MaskDiT", scale, small, batch=scale.batches[0], **{"compute.remat": r}), scale.seconds
            ),
        )
        for remat in ("mlp", "full")
    ]


def _sampling(scale: Scale, small: bool) -> list[Case]:
    def case(name: str, cfg_scale: float, interval: tuple[float, float] | None) -> Case:
        options: dict[str, Any] = {
            "sampling.num_steps": scale.sampling_steps,
            "sampling.cfg_scale": cfg_scale,
        }
        spec = _ours("MaskDiT", scale, small, batch=scale.sampling, **options)
        spec |= {"sampling": True, "guidance_interval": interval}
        return Case(name, lambda: _measured(spec, scale.seconds))

    return [
        case("guided", 1.5, None),
        case("unguided", 1.0, None),
        case("guided in 0.3 … 3", 1.5, (0.3, 3.0)),
    ]


def _torch(scale: Scale, small: bool) -> list[Case]:
    batch = scale.equal[0] if small else 128
    precision: dict[str, Any] = {"compute.precision": "float32"} if small else {}
    spec = _ours("MaskDiT", scale, small, batch=batch, **precision)

    def run(form: str) -> dict[str, Any]:
        return compare_with_torch(spec, forms=(form,), rounds=ROUNDS, steps=1 if small else 10)

    forms = ("eager",) if small else ("eager", "compiled")
    return [Case(f"{form}, batch {batch}", lambda f=form: run(f)) for form in forms]  # type: ignore[misc]


# In the order of what one wants to know first.
PIECES: dict[str, Callable[[Scale, bool], list[Case]]] = {
    "ceiling": _ceiling,
    "parity": _parity,
    "step256": _steps(256),
    "compare256": _compare(256),
    "torch": _torch,
    "step512": _steps(512),
    "sampling": _sampling,
    "compare512": _compare(512),
    "remat": _remat,
}
