"""Golden cases: numbers computed with the authors' implementation, and the weights behind them."""

import json
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskdit_jax.interop.maskdit import fixed_tensors, from_torch, to_torch
from maskdit_jax.methods.maskdit import MaskDiT, MaskDiTDraws, MaskDiTNetwork
from maskdit_jax.methods.method import Shape, init_params, network_graph
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.masking import random_mask

COMPUTE = Compute(precision="float32")
GOLDEN = Path(__file__).parent / "golden"


def channels_last(images: np.ndarray) -> np.ndarray:
    """[B, C, H, W] → [B, H, W, C]."""
    return images.transpose(0, 2, 3, 1)


def seeded_tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Pseudo-random value of a torch tensor, by the rule of the goldens."""
    rng = np.random.default_rng([0, zlib.crc32(key.encode())])
    small = len(shape) == 1 or math.prod(shape[1:]) == 1 or key.endswith("mask_token")
    scale = 0.02 if small else 1 / math.sqrt(math.prod(shape[1:]))
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)


class Case:
    """A network case: its arrays channels last, its method, its weights."""

    def __init__(self, name: str):
        self.arrays = dict(np.load(GOLDEN / f"{name}.npz"))
        self.info = json.loads(str(self.arrays.pop("config_json")))
        mae_coef = self.info["mae_loss_coef"]
        self.network = MaskDiTNetwork(
            size=self.info["model_type"].removeprefix("DiT-"),
            use_decoder=self.info["options"]["use_decoder"],
            mask_token=mae_coef > 0,
        )
        self.data = Shape(self.info["img_resolution"], 4, self.info["num_classes"])
        self.method = MaskDiT(network=self.network, mae_coef=mae_coef)
        self.graphdef = network_graph(self.method, self.data, COMPUTE)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.arrays[name]
        is_image = array.ndim == 4 and array.shape[-1] > 4
        return channels_last(array) if is_image and "__" not in name else array

    def tensors(self) -> dict[str, np.ndarray]:
        """The golden weights under their torch keys, the fixed position tables included."""
        shapes = jax.eval_shape(lambda: self.to_torch(init_params(self.method, self.data, COMPUTE, 0)))
        fixed = fixed_tensors(self.network, self.data)
        weights = {k: s.shape for k, s in shapes.items() if k not in fixed}
        with ThreadPoolExecutor() as pool:
            tensors = dict(zip(weights, pool.map(seeded_tensor, weights, weights.values()), strict=True))
            sums = list(pool.map(lambda x: x.sum(dtype=np.float64), tensors.values()))
            abs_sums = list(pool.map(lambda x: np.abs(x).sum(dtype=np.float64), tensors.values()))
        np.testing.assert_allclose(sum(sums), self.info["weights"]["sum"], rtol=1e-9)
        np.testing.assert_allclose(sum(abs_sums), self.info["weights"]["abs_sum"], rtol=1e-9)
        return tensors | fixed

    def to_torch(self, params: dict) -> dict:
        return to_torch(params, self.network, self.data)

    @cached_property
    def params(self) -> dict:
        return from_torch(self.tensors(), self.network)

    @cached_property
    def draws(self) -> MaskDiTDraws:
        """The case's draws as the input of the loss; half of the tokens hidden."""
        num_tokens = self["mask_noise"].shape[1]
        return MaskDiTDraws(
            clean=jnp.asarray(self["y0"]),
            noisy=jnp.asarray(self["y0"] + self["n"]),
            sigma=jnp.asarray(self["sigma"]),
            labels=self.labels("class_index"),
            mask=random_mask(jnp.asarray(self["mask_noise"]), num_tokens // 2),
        )

    def labels(self, name: str) -> jax.Array:
        unconditional = np.full(len(self["sigma"]), -1, np.int32)
        return jnp.asarray(self.arrays.get(name, unconditional))

    def denoiser(self, params: dict):
        return self.method.denoiser(nnx.merge(self.graphdef, params))

    def loss(self, params: dict, draws: MaskDiTDraws) -> tuple[jax.Array, dict[str, jax.Array]]:
        """As the method computes it, [B] each."""
        return self.method.loss(nnx.merge(self.graphdef, params), draws)


def assert_close_to_rms(actual, expected, tolerance: float = 2e-5) -> None:
    """Largest error at most `tolerance` of the root mean square of the expected values."""
    expected = np.asarray(expected)
    rms = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * rms)
