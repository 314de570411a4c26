"""Golden cases of MaskDM: numbers computed with the authors' implementation, and the weights behind them."""

import functools
import json
import math
import zlib
from functools import cached_property
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden_case import GOLDEN, channels_last

from maskdit_jax.interop import layout_of
from maskdit_jax.methods.method import Shape
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.masking import TokenMask
from maskdit_jax.models.uvit import UViT

INFO = json.loads((GOLDEN / "maskdm_info.json").read_text())
LAYOUT = layout_of("maskdm")
# Our options by the names in the goldens.
NETWORK = {
    "encoder_embed_dim": "hidden_size",
    "encoder_depth": "depth",
    "encoder_heads": "num_heads",
    "patch_size": "patch_size",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "mlp_time_embed": "time_mlp",
}
_TOKENS = ("pos_embed", "decoder_pos_embed", "encoder_pos_embed", "mask_token", "cls_token", "uncond_embed")


def seeded_tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Pseudo-random value of a torch tensor, by the rule of the goldens of MaskDM, DiT and MDT."""
    value = np.random.default_rng([0, zlib.crc32(key.encode())]).standard_normal(shape, dtype=np.float32)
    last = key.split(".")[-1]
    if len(shape) == 1:
        value = value * np.float32(0.02)
        return np.float32(1) + value if last == "weight" else value
    if last in _TOKENS:
        return value * np.float32(0.02)
    return value * np.float32(1 / math.sqrt(math.prod(shape[1:])))


def named_input(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An input that is too large to be stored."""
    rng = np.random.default_rng([0, zlib.crc32(name.encode())])
    return rng.standard_normal(shape, dtype=np.float32)


def token_mask(removed: np.ndarray, num_patches: int) -> TokenMask:
    """Of a golden's mask [B, E + N], True = removed; the visible tokens stay in their order."""
    removed = removed[:, removed.shape[1] - num_patches :]
    shuffle_ids = jnp.argsort(removed, axis=1, stable=True)
    num_keep = int((~removed[0]).sum())
    return TokenMask(shuffle_ids[:, :num_keep], shuffle_ids, jnp.argsort(shuffle_ids, axis=1))


def assert_close(actual, expected, tolerance: float) -> None:
    """max|a - ref| at most `tolerance` · max(1, max|ref|), as the goldens are to be compared."""
    expected = np.asarray(expected)
    atol = tolerance * max(1, float(np.abs(expected).max()))
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=atol)


class MaskDMCase:
    """A network: its options, its golden arrays (images channels last), its weights."""

    def __init__(self, name: str, config: dict | None = None):
        """config: of the goldens' info file, where not that of the case."""
        self.info = INFO[name]
        config = config or self.info["config"]
        self.network = SimpleNamespace(**{ours: config[theirs] for theirs, ours in NETWORK.items()})
        self.data = Shape(config["img_size"], config["in_chans"], max(config["num_classes"], 0))
        self.num_patches = (self.data.image_size // self.network.patch_size) ** 2
        self.arrays = dict(np.load(GOLDEN / f"maskdm_{name}.npz"))

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.arrays[name]
        return channels_last(array) if array.ndim == 4 else array

    @property
    def mask(self) -> TokenMask:
        return token_mask(self["mask"], self.num_patches)

    @property
    def labels(self) -> np.ndarray:
        return self.arrays.get("y", np.full(len(self["t"]), -1)).astype(np.int32)

    def build(self, rngs: nnx.Rngs) -> UViT:
        compute = Compute(precision="float32", unroll="none")
        return UViT(**vars(self.network), **self.data._asdict(), compute=compute, rngs=rngs)

    def tensors(self) -> dict[str, np.ndarray]:
        """The golden weights under their torch keys; keys and shapes are ours, the sums the golden's."""
        tensors = {key: seeded_tensor(key, shape) for key, shape in self.shapes().items()}
        sums = (sum(f(x).sum(dtype=np.float64) for x in tensors.values()) for f in (np.asarray, np.abs))
        weights = self.info["weights"]
        np.testing.assert_allclose(list(sums), [weights["sum"], weights["abs_sum"]], rtol=1e-9)
        return tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of our parameters as torch tensors."""

        def tensors():
            return self.to_torch(nnx.to_pure_dict(nnx.split(self.build(nnx.Rngs(0)))[1]))

        return {key: x.shape for key, x in jax.eval_shape(tensors).items()}

    def to_torch(self, params: dict) -> dict:
        return LAYOUT.to_torch(params, self.network, self.data)

    @cached_property
    def params(self) -> dict:
        return LAYOUT.from_torch(self.tensors(), self.network)

    @cached_property
    def graphdef(self) -> nnx.GraphDef:
        return nnx.split(nnx.eval_shape(lambda: self.build(nnx.Rngs(0))))[0]


@functools.cache
def maskdm_case(name: str) -> MaskDMCase:
    return MaskDMCase(name)
