"""The weights of FID's Inception-v3, as torch-fidelity and pytorch-fid pass them on.

Names are torchvision's: a convolution without bias and the batch norm after it, X.conv.weight and
X.bn.{weight, bias, running_mean, running_var}, which become one convolution with a bias here; and fc.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from maskdit_jax.errors import UserError, shown
from maskdit_jax.interop.tables import Shapes, find
from maskdit_jax.interop.torch_io import as_float32, check_shapes, read_file, shapes_of
from maskdit_jax.log import log

# One file, published under two names.
FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
NORM_EPS = 1e-3
WHERE = (
    f"FID needs the weights {FILES[0]} (github.com/mseitzer/pytorch-fid, release fid_weights) or "
    f"{FILES[1]} (github.com/toshas/torch-fidelity, release v0.2.0): the same 95,628,359 bytes, "
    f"sha256 {SHA256}; give its path, or that of its tensors as .safetensors, with --inception"
)
_NORM = ("weight", "bias", "running_mean", "running_var")


class InceptionFile(NamedTuple):
    """params: of `InceptionV3`, numpy float32; sha256: of the file."""

    params: dict[str, Any]
    sha256: str


def read_weights(path: str | Path, params: dict[str, Any]) -> InceptionFile:
    """The weights in a file .pth or .safetensors, for a network whose parameters have these shapes.

    Warns where they are not the published ones.

    Raises:
      UserError: no such file (the message says where it is to be had), damaged, or another network's.
    """
    file = Path(path)
    if not file.exists():
        raise UserError(f"{file}: no such file. {WHERE}")
    expected = _torch_shapes(params)
    counters = {f"{name.removesuffix('running_var')}num_batches_tracked" for name in expected}
    content = {name: x for name, x in read_file(file).items() if name not in counters}
    found = shapes_of(content, str(file), file.stat().st_size)
    check_shapes(found, expected, str(file), "Inception-v3 as FID uses it")
    tensors = as_float32(content, str(file))
    # A square root of these is in every feature; one value that is none makes all of them NaN.
    bad = [
        name
        for name, x in tensors.items()
        if not np.isfinite(x).all() or (name.endswith("running_var") and x.min() < 0)
    ]
    if bad:
        raise UserError(f"{file}: {shown(bad[0])} has values that are not finite, or a negative variance")
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    if file.suffix == ".safetensors":
        log.info(f"{file} has sha256 {sha256}: no hash is published of Inception's weights as .safetensors")
    elif sha256 != SHA256:
        log.warning(
            f"warning: {file} has sha256 {sha256}, not {SHA256} of the published weights: the numbers can "
            "only be compared with others of this file"
        )
    return InceptionFile(_fold(tensors, params), sha256)


def _torch_shapes(params: dict[str, Any]) -> Shapes:
    """Names and shapes of the tensors in PyTorch, all but the counters of batch norm."""
    shapes: Shapes = {}
    for path, kernel in _layers(params):
        weight = f"{path}.weight"
        if kernel.ndim == 2:
            shapes |= {weight: kernel.shape[::-1], f"{path}.bias": kernel.shape[1:]}
        else:
            height, width, before, after = kernel.shape
            norm = path.removesuffix("conv") + "bn"
            shapes |= {weight: (after, before, height, width)}
            shapes |= {f"{norm}.{name}": (after,) for name in _NORM}
    return shapes


def _layers(params: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Path and kernel of every convolution and linear map."""
    if "kernel" in params:
        return [(prefix, params["kernel"])]
    return [
        layer
        for name, value in params.items()
        for layer in _layers(value, f"{prefix}.{name}" if prefix else name)
    ]


def _fold(tensors: dict[str, np.ndarray], params: dict[str, Any]) -> dict[str, Any]:
    """Parameters; batch norm at inference, (x - mean)·scale + bias, is part of the convolution before it."""
    folded = jax.tree.map(lambda _: None, params)
    for path, kernel in _layers(params):
        weight = tensors[f"{path}.weight"]
        layer = find(folded, path)
        if kernel.ndim == 2:
            layer.update(kernel=weight.T, bias=tensors[f"{path}.bias"])
            continue
        norm = path.removesuffix("conv") + "bn"
        gain, bias, mean, variance = (tensors[f"{norm}.{name}"].astype(np.float64) for name in _NORM)
        scale = gain / np.sqrt(variance + NORM_EPS)
        kernel = (weight * scale[:, None, None, None]).transpose(2, 3, 1, 0)
        layer.update(kernel=kernel.astype(np.float32), bias=(bias - mean * scale).astype(np.float32))
    return folded
