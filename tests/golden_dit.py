"""Golden cases of DiT: numbers computed with the authors' implementation, and the weights behind them."""

import functools
import json

import jax
import numpy as np
from flax import nnx
from golden_case import GOLDEN, channels_last
from golden_maskdm import seeded_tensor

from maskdit_jax.interop import layout_of
from maskdit_jax.methods.dit import DiT, DiTNetwork
from maskdit_jax.methods.method import Shape, init_params, network_graph
from maskdit_jax.models.compute import Compute

INFO = json.loads((GOLDEN / "fbdit_info.json").read_text())
LAYOUT = layout_of("dit")
COMPUTE = Compute(precision="float32", unroll="none")
LATENTS = Shape(image_size=32, channels=4, num_classes=1000)


def our_labels(y: np.ndarray) -> np.ndarray:
    """Class 1000 is none there, -1 here."""
    return np.where(y == 1000, -1, y).astype(np.int32)


def our_prediction(prediction: np.ndarray) -> np.ndarray:
    """Golden images, and pairs of them, channels last."""
    return np.moveaxis(prediction, -3, -1)


def tensor_shapes(method: DiT, data: Shape) -> dict[str, tuple[int, ...]]:
    """Of a network's parameters as torch tensors."""

    def tensors():
        return LAYOUT.to_torch(init_params(method, data, COMPUTE, 0), method.network, data)

    return {key: x.shape for key, x in jax.eval_shape(tensors).items()}


class DiTCase:
    """DiT-S/2: its method, golden arrays (images channels last) and weights."""

    def __init__(self):
        self.method = DiT(network=DiTNetwork(size="S/2"))
        arrays = dict(np.load(GOLDEN / "fbdit_s2.npz")) | {
            f"loss/{name}": x for name, x in np.load(GOLDEN / "fbdit_s2_loss.npz").items()
        }
        self.arrays = {
            name: channels_last(x) if x.ndim == 4 and "grad" not in name else x for name, x in arrays.items()
        }
        self.graphdef = network_graph(self.method, LATENTS, COMPUTE)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.arrays[name]
        return our_labels(array) if name.endswith("y") else array

    @functools.cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """The golden weights under their torch keys; keys and shapes are ours, the sums the golden's."""
        shapes = tensor_shapes(self.method, LATENTS)
        assert shapes == {entry["key"]: tuple(entry["shape"]) for entry in INFO["s2"]["keys"]}
        fixed = LAYOUT.fixed_tensors(self.method.network, LATENTS)
        learned = {key: seeded_tensor(key, shape) for key, shape in shapes.items() if key not in fixed}
        sums = [sum(f(x).sum(dtype=np.float64) for x in learned.values()) for f in (np.asarray, np.abs)]
        expected = INFO["s2"]["weights"]
        np.testing.assert_allclose(sums, [expected["sum"], expected["abs_sum"]], rtol=1e-9)
        return fixed | learned

    @functools.cached_property
    def params(self) -> dict:
        return LAYOUT.from_torch(self.tensors, self.method.network)

    def network(self, params: dict) -> nnx.Module:
        return nnx.merge(self.graphdef, params)


@functools.cache
def dit_case() -> DiTCase:
    return DiTCase()
