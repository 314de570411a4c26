"""Golden cases of MDT: numbers computed with the authors' implementation, and the weights behind them."""

import functools
import json

import jax
import numpy as np
from flax import nnx
from golden_case import GOLDEN, channels_last
from golden_dit import COMPUTE, LATENTS, our_labels
from golden_maskdm import seeded_tensor

from maskdit_jax.interop import layout_of
from maskdit_jax.methods.mdt import MDT, MDTNetwork
from maskdit_jax.methods.method import Shape, init_params, network_graph

LAYOUT = layout_of("mdt")


def mdt_of(size: str, version: int) -> MDT:
    """A published network, with the options of its training."""
    network = MDTNetwork(size=size, version=version)
    return MDT(network=network, **LAYOUT.method_options(network))


def tensor_shapes(method: MDT, data: Shape = LATENTS) -> dict[str, tuple[int, ...]]:
    """Of a network's parameters as torch tensors, the fixed tables included."""

    def tensors():
        return LAYOUT.to_torch(init_params(method, data, COMPUTE, 0), method.network, data)

    return {key: x.shape for key, x in jax.eval_shape(tensors).items()}


class MDTCase:
    """MDT-S/2 of a version: its method, golden arrays (images channels last) and weights."""

    def __init__(self, version: int):
        self.name = f"mdtv{version}"
        self.info = json.loads((GOLDEN / f"{self.name}_info.json").read_text())
        self.method = mdt_of("S/2", version)
        files = {"": "s2", "loss/": "s2_loss", "terms/": "loss_terms"}
        self.arrays = {
            prefix + name: channels_last(x) if x.ndim == 4 and "grad" not in name else x
            for prefix, file in files.items()
            for name, x in np.load(GOLDEN / f"{self.name}_{file}.npz").items()
        }
        self.graphdef = network_graph(self.method, LATENTS, COMPUTE)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.arrays[name]
        return our_labels(array) if name.endswith("y") else array

    @functools.cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """The golden weights under their torch keys; keys and shapes are ours, the sums the golden's."""
        shapes = tensor_shapes(self.method)
        assert shapes == {entry["key"]: tuple(entry["shape"]) for entry in self.info["s2"]["keys"]}
        fixed = LAYOUT.fixed_tensors(self.method.network, LATENTS)
        learned = {key: seeded_tensor(key, shape) for key, shape in shapes.items() if key not in fixed}
        sums = [sum(f(x).sum(dtype=np.float64) for x in learned.values()) for f in (np.asarray, np.abs)]
        expected = self.info["s2"]["weights"]
        np.testing.assert_allclose(sums, [expected["sum"], expected["abs_sum"]], rtol=1e-9)
        return fixed | learned

    @functools.cached_property
    def params(self) -> dict:
        return LAYOUT.from_torch(self.tensors, self.method.network)

    def network(self, params: dict) -> nnx.Module:
        return nnx.merge(self.graphdef, params)


@functools.cache
def mdt_case(version: int) -> MDTCase:
    return MDTCase(version)
