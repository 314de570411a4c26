"""Costs as tables and as JSON: of one configuration, and of several methods at one size."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from maskdit_jax.config import ConfigDict, defaults, resolve, shape_of
from maskdit_jax.methods import METHODS
from maskdit_jax.models.compute import REMAT_POLICIES
from maskdit_jax.training.build import batch_shapes, build
from maskdit_jax.training.cost import FLOPS_PER_MAC, STEP_OVER_LOSS, Cost, activation_bytes, cost_of
from maskdit_jax.training.products import ATTENTION, LINEAR, Key

CONVENTIONS = """
GMAC: 10^9 multiply-adds of one image, of 2 FLOP each. Counted: matrix products of linear layers, embeddings
(of labels: one-hot rows by a table) and the two products of attention. Not counted: softmax, norms,
activations, biases, optimizer, EMA, autoencoder. Inference: one call of the denoiser, all patches, unguided.
Training: the loss forward, all of its passes; a step is 3 times that. Activations (MB: 10^6 bytes): what the
backward pass of one image keeps: operands and results of products, inputs of blocks. Those of attention are
not kept where one kernel computes it, on a GPU in bfloat16.
""".strip()
# Of XL/2 at 256 px (32×32 latents), MaskDiT's GFLOPs over the other's: its paper, arXiv 2306.09305.
PUBLISHED = {"dit": 0.540, "mdt": 0.317}
PUBLISHED_AT = ("maskdit", "XL/2", 32)
COMPARED_PRECISIONS = ("bfloat16", "float32")  # tf32 keeps what float32 does


def to_json(config: ConfigDict, cost: Cost) -> dict[str, Any]:
    """A cost as nested dicts: MACs and bytes of one image, bytes of the state."""

    def kinds(counts: Counter[Key], part: str) -> dict[str, int]:
        return {kind: counts[Key(part, kind)] for kind in (LINEAR, ATTENTION)}

    return {
        "method": config.method.name,
        "size": config.method.network.get("size"),
        "data": shape_of(config)._asdict(),
        "tokens": cost.num_tokens,
        "visible_tokens": cost.num_keep,
        "parts": {
            part: {
                "parameters": cost.parameters.get(part, 0),
                "inference_macs": kinds(cost.inference, part),
                "training_macs": kinds(cost.training, part),
                "activation_bytes": kinds(cost.activations, part),
            }
            for part in _parts(cost)
        },
        "parameters": sum(cost.parameters.values()),
        "inference_macs": cost.inference.total(),
        "training_macs": cost.training.total(),
        "train_step_flops": FLOPS_PER_MAC * STEP_OVER_LOSS * cost.training.total(),
        "train_step_flops_with_recomputation": FLOPS_PER_MAC * cost.gradient,
        "activation_bytes": _by_kind(cost.activations),
        "state_bytes": cost.state,
    }


def table(config: ConfigDict, cost: Cost) -> list[str]:
    """Lines that show the cost of a configuration, part by part."""
    unit, name = (1e9, "GMAC") if cost.inference.total() >= 1e9 else (1e6, "MMAC")
    rows = [
        ["", "", f"inference, {name}", "", f"training, {name}", "", "activations, MB", ""],
        ["", "parameters", *[LINEAR, ATTENTION] * 3],
    ]
    columns = [(cost.inference, unit), (cost.training, unit), (cost.activations, 1e6)]
    for part in [*_parts(cost), ""]:  # "": all of them
        parameters = cost.parameters.get(part, 0) if part else sum(cost.parameters.values())
        row = [part or "total", f"{parameters:,}"]
        for counts, in_one in columns:
            for kind in (LINEAR, ATTENTION):
                row.append(f"{(counts[Key(part, kind)] if part else _by_kind(counts)[kind]) / in_one:,.3f}")
        rows.append(row)
    forward, state = cost.training.total(), cost.state
    step = FLOPS_PER_MAC * STEP_OVER_LOSS * forward
    return [
        f"{_titled(config)}, {config.data.num_classes:,} classes; {cost.num_keep:,} of {cost.num_tokens:,} "
        "patches visible in training",
        *_aligned(rows),
        f"inference {cost.inference.total() / unit:,.2f} {name}; training {forward / unit:,.2f} {name}; "
        f"a step {step / 1e9:,.4g} GFLOP, with what compute.remat={config.compute.remat} computes again "
        f"{FLOPS_PER_MAC * cost.gradient / 1e9:,.4g}",
        f"state: parameters {state['params'] / 1e6:,.1f} MB, EMA {state['ema'] / 1e6:,.1f} MB, optimizer "
        f"{state['opt_state'] / 1e6:,.1f} MB; {state['on_each_device'] / 1e6:,.1f} MB on each device (of "
        f"{config.mesh.data * config.mesh.fsdp}); a step adds the gradient, as large as the parameters",
    ]


def activation_table(config: ConfigDict) -> tuple[list[str], dict[str, dict[str, dict[str, int]]]]:
    """Bytes of activations of an image by precision and remat preset: lines, and for JSON."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for precision in COMPARED_PRECISIONS:
        for remat in REMAT_POLICIES:
            varied = ConfigDict(config.to_dict())
            varied.compute.update(precision=precision, remat=remat)
            found.setdefault(precision, {})[remat] = _by_kind(activation_bytes(varied))
    rows = [["MB of activations", *(f"remat {remat}" for remat in REMAT_POLICIES)]]
    for precision, presets in found.items():
        cells = [f"{kept[LINEAR] / 1e6:,.1f} + {kept[ATTENTION] / 1e6:,.1f}" for kept in presets.values()]
        rows.append([precision, *cells])
    return [*_aligned(rows), "(linear + attention)"], found


def compared_by_default() -> list[str]:
    """MaskDiT, and the methods that its paper compares it with."""
    return [PUBLISHED_AT[0], *PUBLISHED]


def compare(methods: Sequence[str], size: str, image_sizes: Sequence[int]) -> tuple[list[str], list[dict]]:
    """The first method beside the others, each as it is published, at one size and several resolutions.

    Lines, the last of which are the ratios of multiply-adds in a training step, and the costs as JSON.

    Raises:
      UserError: there is no such method, or it has no such size.
    """
    rows = [
        ["", "parameters", "inference", "training", "activations", "state", "visible"],
        ["", "10^6", "GMAC", "GMAC", "MB, linear + attention", "GB", "patches"],
    ]
    # All of them first: a slip in the last is said before the first is counted.
    configs = {(method, side): _published(method, size, side) for side in image_sizes for method in methods}
    costs, forward = [], {}
    for side in image_sizes:
        rows.append([f"{size}, {side}×{side}×4"])
        for method in methods:
            config = configs[method, side]
            cost = cost_of(config)
            forward[method, side] = cost.training.total()
            costs.append(to_json(config, cost))
            rows.append(_summary(method, cost))
    lines = _aligned(rows)
    first, *others = methods
    for other in others:
        for side in image_sizes:
            ratio = forward[first, side] / forward[other, side]
            names = f"{METHODS[first].__name__} : {METHODS[other].__name__}"
            line = f"training, {names}, {size}, {side}×{side}×4: {ratio:.1%}"
            if (first, size, side) == PUBLISHED_AT and other in PUBLISHED:
                line += f" (the paper's: {PUBLISHED[other]:.1%})"
            lines.append(line)
    return lines, costs


def check_against_xla(config: ConfigDict, cost: Cost) -> tuple[list[str], dict[str, float]]:
    """Compile the training step of `config`, its loops over blocks unrolled, and let XLA count its FLOPs.

    XLA counts every operation, so it must come to more than the products alone, by little.
    """
    unrolled = ConfigDict(config.to_dict())
    unrolled.compute.unroll = "full"  # the body of a loop would count once
    training, batch_size = build(unrolled), config.training.batch_size
    shapes = batch_shapes(unrolled, training.mesh, batch_size)
    compiled = training.step.lower(training.state_shapes, shapes, cost.num_keep).compile()
    devices = training.mesh.size
    memory: Any = compiled.memory_analysis()
    operations: Any = compiled.cost_analysis()
    found = {
        "batch_size": batch_size,
        "xla_flops": operations["flops"] * devices / batch_size,
        "product_flops": FLOPS_PER_MAC * cost.gradient,
        "xla_temporary_bytes": memory.temp_size_in_bytes * devices / batch_size,
        "activation_bytes": cost.activations.total(),
    }
    ratio = found["xla_flops"] / found["product_flops"]
    return [
        f"XLA, compiled for {batch_size} images: {found['xla_flops'] / 1e9:,.3f} GFLOP an image, "
        f"{ratio - 1:+.2%} of the {found['product_flops'] / 1e9:,.3f} of products: it counts all operations, "
        "optimizer and EMA too",
        f"XLA's temporaries: {found['xla_temporary_bytes'] / 1e6:,.1f} MB an image, the gradient in them; "
        f"activations {found['activation_bytes'] / 1e6:,.1f} MB",
    ], found


def _published(method: str, size: str, image_size: int) -> ConfigDict:
    """A method with its defaults, which are its paper's, for ImageNet's latents."""
    config = defaults(method)
    config.method.network.size = size
    config.data.image_size = image_size
    return resolve(config, device_count=1)


def _summary(method: str, cost: Cost) -> list[str]:
    kinds = _by_kind(cost.activations)
    state = sum(cost.state[name] for name in ("params", "ema", "opt_state"))
    return [
        METHODS[method].__name__,
        f"{sum(cost.parameters.values()) / 1e6:,.1f}",
        f"{cost.inference.total() / 1e9:,.2f}",
        f"{cost.training.total() / 1e9:,.2f}",
        f"{kinds[LINEAR] / 1e6:,.1f} + {kinds[ATTENTION] / 1e6:,.1f}",
        f"{state / 1e9:,.2f}",
        f"{cost.num_keep:,} of {cost.num_tokens:,}",
    ]


def _parts(cost: Cost) -> list[str]:
    """Everything that has a parameter, a product or an activation; as data meet it, then the rest."""
    met = [key.part for key in (*cost.training, *cost.inference)]
    return list(dict.fromkeys([*met, *cost.parameters, *(key.part for key in cost.activations)]))


def _by_kind(counts: Counter[Key]) -> dict[str, int]:
    return {kind: sum(n for key, n in counts.items() if key.kind == kind) for kind in (LINEAR, ATTENTION)}


def _titled(config: ConfigDict) -> str:
    """Such as MaskDiT XL/2, 32×32×4."""
    data, size = shape_of(config), config.method.network.get("size", "")
    side = data.image_size
    return f"{METHODS[config.method.name].__name__} {size}, {side}×{side}×{data.channels}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right of their width."""
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in full) for i in range(len(full[0]))]
    lines = []
    for first, *cells in rows:
        line = first.ljust(widths[0]) + "".join(cell.rjust(w + 2) for cell, w in zip(cells, widths[1:]))
        lines.append(line.rstrip())
    return lines
