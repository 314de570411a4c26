"""A whole method in one file, see docs/extending.md: a network of two layers, its noise and its loss."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maskdit_jax.diffusion.edm import Denoiser, per_sample
from maskdit_jax.methods.method import Method, Network, Shape
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.embed import Linear
from maskdit_jax.options import option


class TwoLayers(nnx.Module):
    """Clean data [B, H, W, C] guessed from their mixture with noise, and its share t [B]."""

    def __init__(self, values: int, hidden_size: int, compute: Compute, rngs: nnx.Rngs):
        self.fc1 = Linear(values + 1, hidden_size, dtype=compute.dtype, rngs=rngs)
        self.fc2 = Linear(hidden_size, values, dtype=compute.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        hidden = jnp.concatenate([x.reshape(len(x), -1), t[:, None]], axis=-1)
        return self.fc2(jax.nn.silu(self.fc1(hidden))).astype(jnp.float32).reshape(x.shape)


@dataclass(frozen=True)
class ToyNetwork:
    hidden_size: int = option(32, "width of the hidden layer", at_least=1)


class ToyDraws(NamedTuple):
    clean: jax.Array  # [B, H, W, C]
    mixed: jax.Array  # [B, H, W, C]
    t: jax.Array  # [B]


@dataclass(frozen=True)
class Toy(Method):
    """Straight paths: x_t = (1 - t)·clean + t·noise; the network predicts clean; absolute error."""

    network: ToyNetwork = field(default_factory=ToyNetwork)
    t_max: float = option(0.99, "largest share of noise in training", above=0, at_most=1)

    def build(self, data: Shape, compute: Compute, rngs: nnx.Rngs) -> TwoLayers:
        return TwoLayers(data.image_size**2 * data.channels, self.network.hidden_size, compute, rngs)

    def draw(self, key: jax.Array, batch: dict[str, jax.Array], num_keep: int) -> ToyDraws:
        t_key, noise_key = jax.random.split(key)
        clean = batch["clean"]
        t = self.t_max * jax.random.uniform(t_key, (len(clean),))
        noise = jax.random.normal(noise_key, clean.shape)
        return ToyDraws(clean, per_sample(1 - t) * clean + per_sample(t) * noise, t)

    def loss(self, network: Network, draws: ToyDraws) -> tuple[jax.Array, dict[str, jax.Array]]:
        error = jnp.abs(network(draws.mixed, draws.t) - draws.clean).mean(axis=(1, 2, 3))
        return error, {"largest_t": draws.t}

    def denoiser(self, network: Network) -> Denoiser:
        # clean + sigma·noise is 1 + sigma times such a mixture, with t = sigma / (1 + sigma).
        return lambda x, sigma, labels: network(x / per_sample(1 + sigma), sigma / (1 + sigma))
