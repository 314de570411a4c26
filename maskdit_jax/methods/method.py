"""What a method is: the interface between what is learned, and everything that is written once for all."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from flax import nnx

from maskdit_jax.diffusion.edm import Denoiser
from maskdit_jax.diffusion.solvers import SamplerOptions
from maskdit_jax.errors import UserError
from maskdit_jax.models.compute import Compute

Params = dict[str, Any]
# Everything random of a training step: a pytree of arrays [B, …], drawn before any of it is computed with.
Draws = Any
# What `Method.build` makes; the method alone knows how it is called.
Network = Any
MAX_TOKENS = 2**16


class Shape(NamedTuple):
    """Of the data that a method sees: square, height and width `image_size`; num_classes 0: no classes."""

    image_size: int
    channels: int
    num_classes: int


@dataclass(frozen=True)
class Method:
    """What is learned and how: network, noise, loss, parametrisation, and their options.

    A method is a frozen dataclass; its fields, made by `option`, are the section `method` of a
    configuration. Nothing but `network` decides which parameters there are.
    """

    network: Any
    sampler: ClassVar[SamplerOptions] = SamplerOptions()  # the method's defaults

    def check(self, data: Shape) -> None:
        """Refuse options that do not go together, or not with the data.

        Raises:
          UserError: which, and what to do.
        """

    def build(self, data: Shape, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """The network for data of that shape, freshly initialised."""
        raise NotImplementedError

    def num_tokens(self, data: Shape) -> int:
        """N, the tokens of an item of which nothing is hidden."""
        return data.image_size**2

    def num_keep(self, data: Shape, step: int, num_steps: int) -> int:
        """How many of them are visible in step `step` of a run: static, each value a compiled program."""
        return self.num_tokens(data)

    def num_keep_range(self, data: Shape, num_steps: int) -> tuple[int, int]:
        """The fewest and the most of them in any step of a run; by default in its first and last."""
        low, high = sorted(self.num_keep(data, step, num_steps) for step in (0, num_steps - 1))
        return low, high

    def draw(self, key: jax.Array, batch: dict[str, jax.Array], num_keep: int) -> Draws:
        """Everything random of a step.

        batch: `clean` [B, H, W, C] float32, `labels` [B] int32, and whatever else the source gives.
        """
        raise NotImplementedError

    def loss(self, network: Network, draws: Draws) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss per sample [B], and by name whatever else a report should show, [B] each."""
        raise NotImplementedError

    def denoiser(self, network: Network) -> Denoiser:
        """D(x, sigma, labels) for x = clean + sigma·noise: what guidance and solvers see of a method.

        A method that learns the variance of ancestral steps returns its share with it: `variance_denoiser`.
        """
        raise NotImplementedError

    def data_std(self) -> float | None:
        """Standard deviation of the data that the parametrisation assumes, where it does."""
        return None

    def noise_levels(self) -> np.ndarray | None:
        """Noise level of each timestep [T], rising, float64, where the method is trained on timesteps."""
        return None


def check_patches(data: Shape, patch_size: int) -> int:
    """Number of tokens of patches that must cover an image.

    Raises:
      UserError: they do not, or there are too many.
    """
    if data.image_size % patch_size:
        raise UserError(
            f"method.network.patch_size={patch_size} does not divide data.image_size={data.image_size}"
        )
    tokens = (data.image_size // patch_size) ** 2
    if tokens > MAX_TOKENS:
        raise UserError(
            f"data.image_size={data.image_size} in patches of {patch_size} makes {tokens:,} tokens, at most "
            f"{MAX_TOKENS:,} are possible; use a larger method.network.patch_size"
        )
    return tokens


def check_heads(network: Any, heads: str, width: str) -> None:
    """Compare two options of a network, its heads and its width.

    Raises:
      UserError: each head would not get the same share, or position tables no four parts.
    """
    h, w = getattr(network, heads), getattr(network, width)
    if h > w or w % h:
        raise UserError(f"method.network.{heads}={h} does not divide method.network.{width}={w}")
    if w % 4:
        raise UserError(f"method.network.{width}={w} must be a multiple of 4")


def check_visible(num_keep: int, num_tokens: int, name: str, ratio: float) -> None:
    """At least one token must be visible.

    Raises:
      UserError: none is; the message says how large the ratio may be.
    """
    if num_keep < 1:
        at_most = math.floor(1000 * (1 - 1 / num_tokens)) / 1000
        raise UserError(f"method.{name}={ratio} hides all {num_tokens} patches; use at most {at_most}")


def network_graph(method: Method, data: Shape, compute: Compute) -> nnx.GraphDef:
    """The static half of a method's network: merged with parameters it is the network."""
    return nnx.split(nnx.eval_shape(lambda: method.build(data, compute, nnx.Rngs(0))))[0]


def init_params(method: Method, data: Shape, compute: Compute, seed: int | jax.Array) -> Params:
    """Fresh parameters of a method's network."""
    return nnx.to_pure_dict(nnx.split(method.build(data, compute, nnx.Rngs(seed)))[1])
