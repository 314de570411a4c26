"""Whether a device computes what a CPU does in float32: outputs, loss and gradient of small networks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maskdit_jax.benchmark.memory import allocator_peak
from maskdit_jax.benchmark.side import Side
from maskdit_jax.benchmark.step import synthetic_batch
from maskdit_jax.config import ConfigDict, compute_of, method_of, shape_of
from maskdit_jax.data.codec import Codec
from maskdit_jax.errors import first_line
from maskdit_jax.methods.method import init_params
from maskdit_jax.sampling import Model
from maskdit_jax.training.build import batch_shapes, build

# Largest relative distances of outputs and loss, and of the gradient, chosen: in bfloat16 a CPU itself has
# 0.005 and 0.009 (docs/RESULTS.md, Parity); tf32 has three bits more.
BOUNDS = {"bfloat16": (0.02, 0.04), "tf32": (0.0025, 0.005), "float32": (1e-4, 1e-4)}
# How XLA calls cuDNN's attention in a compiled program.
ATTENTION_CALL = "__cudnn$fmha"
_OF_BLOCK = {"size": "custom", "hidden_size": 288, "depth": 2, "num_heads": 4, "patch_size": 2}
_DECODER = {"decoder_hidden_size": 128, "decoder_depth": 1, "decoder_num_heads": 4}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    # Heads of 72 in the encoder and of 32 in the decoder, as XL/2 has them.
    "MaskDiT": ("in256", _OF_BLOCK | _DECODER),
    "DiT": ("in256_dit", _OF_BLOCK),
    "MDT": ("in256_mdt", _OF_BLOCK | {"decoder_depth": 1}),
    # 416 visible patches of 4096 and the time token: 417.
    "MaskDM": (
        "celebahq256_pretrain",
        {"size": "custom", "hidden_size": 128, "depth": 3, "num_heads": 2, "patch_size": 4},
    ),
}


def sides(precision: str, small: bool) -> dict[str, Side]:
    """A side for each method; `small` sees images of a quarter of the side."""
    found = {}
    for name, (config, network) in NETWORKS.items():
        options = {f"method.network.{key}": value for key, value in network.items()}
        options |= {"compute.precision": precision, "training.batch_size": jax.device_count() * 2}
        if small:
            options["data.image_size"] = 64 if name == "MaskDM" else 8
        found[name] = Side(config, [f"--config.{key}={value}" for key, value in options.items()])
    return found


def write_outputs(precision: str, small: bool, folder: Path) -> dict[str, Any]:
    """Compute every network's outputs in that precision on this process's devices; a file for each.

    Returns by network how often its step calls cuDNN's attention, or {"failed": why}.
    """
    said: dict[str, Any] = {}
    for name, side in sides(precision, small).items():
        try:
            arrays, calls = outputs(side.resolved())
            np.savez(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
            said[name] = {"attention_calls": calls}
        except Exception as error:  # one network must not hide the others
            said[name] = {"failed": first_line(error)}
    return {"networks": said, "device": jax.devices()[0].device_kind, "peak_bytes": allocator_peak()}


def outputs(config: ConfigDict) -> tuple[dict[str, np.ndarray], int]:
    """Denoised images, loss and gradient of a step, of weights that are nowhere zero; calls of attention."""
    method, data, training = method_of(config), shape_of(config), build(config)
    rng, batch_size = np.random.default_rng(0), config.training.batch_size
    fresh = jax.jit(lambda: init_params(method, data, compute_of(config), 0))()
    params = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), fresh)
    model = Model(config, params, training.mesh, Codec(config.data.space, config.data.latent_scale))
    sigma = np.geomspace(0.05, 5, batch_size).astype(np.float32)
    x = rng.standard_normal((batch_size, *model.image_shape)).astype(np.float32)
    x *= np.hypot(0.5, sigma)[:, None, None, None]
    labels = jnp.full(batch_size, 0 if data.num_classes else -1)
    denoised = model(jnp.asarray(x), jnp.asarray(sigma), labels)

    state, batch = training.start(params), synthetic_batch(config, training)
    shapes = batch_shapes(config, training.mesh, batch_size)
    compiled = training.step.lower(training.state_shapes, shapes, training.num_keep(0)).compile()
    state, metrics = compiled(state, batch)
    # After one step the optimizer's first moment is the gradient, times a number.
    first_moment = jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))
    gradient = np.concatenate([np.asarray(leaf).ravel() for leaf in first_moment])
    arrays = {"outputs": np.asarray(denoised), "loss": np.asarray(metrics["loss"]), "gradient": gradient}
    return arrays, (compiled.as_text() or "").count(ATTENTION_CALL)


def distances(folder: Path, reference: Path, precision: str, names: Sequence[str]) -> dict[str, Any]:
    """How far one folder of `write_outputs` is from another, relative, and whether that is within bounds."""
    found = {}
    for name in names:
        with np.load(folder / f"{name}.npz") as a, np.load(reference / f"{name}.npz") as b:
            far = {
                key: float(np.linalg.norm(np.float64(a[key]) - b[key]) / np.linalg.norm(b[key])) for key in b
            }
        of_values, of_gradient = BOUNDS[precision]
        bounds = {"outputs": of_values, "loss": of_values, "gradient": of_gradient}
        found[name] = far | {"within": all(far[key] <= bounds[key] for key in bounds)}
    return found
