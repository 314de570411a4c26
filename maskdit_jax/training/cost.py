"""What a configuration costs: parameters, multiply-adds and memory of each part; from shapes, nothing is run.

A multiply-add (MAC) is two floating point operations. Counted are matrix products and convolutions of one
image: linear layers, embeddings (that of labels too, a product with one-hot rows) and the two products of
attention; softmax, norms, activations, biases, gathers, optimizer, EMA and the autoencoder are not.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maskdit_jax.config import ConfigDict, compute_of, method_of, shape_of
from maskdit_jax.distributed.mesh import bytes_of
from maskdit_jax.methods.method import Draws, Params, init_params, network_graph
from maskdit_jax.models.compute import Compute
from maskdit_jax.training.build import build
from maskdit_jax.training.products import Key, trace_products

# A training step's products are three times those of its loss: the gradient of a product is two of its size.
STEP_OVER_LOSS = 3
FLOPS_PER_MAC = 2


class Cost(NamedTuple):
    """Of one image, MACs and bytes by part and kind of product; parameters by part; the state's bytes.

    inference: one call of the denoiser. training: the loss, with its visible patches of num_tokens, every
    pass of the network that it makes. gradient: MACs of the loss and its gradient as they are computed,
    recomputation included. activations: what the backward pass keeps. state: parameters, EMA, optimizer,
    and on_each_device, all of them.
    """

    num_tokens: int
    num_keep: int
    parameters: dict[str, int]
    inference: Counter[Key]
    training: Counter[Key]
    gradient: int
    activations: Counter[Key]
    state: dict[str, int]


def cost_of(config: ConfigDict) -> Cost:
    """The cost of the run that `config`, resolved, describes, at its first mask ratio."""
    method, data, shapes = method_of(config), shape_of(config), build(config).state_shapes
    traced = _Traced(config)
    whole = {name: bytes_of(getattr(shapes, name))[0] for name in ("params", "ema", "opt_state")}
    return Cost(
        num_tokens=method.num_tokens(data),
        num_keep=traced.num_keep,
        parameters={name: _count(tree) for name, tree in shapes.params.items()},
        inference=traced.inference(),
        training=traced.training(),
        gradient=traced.gradient(compute_of(config).remat),
        activations=traced.activations(compute_of(config)),
        state=whole | {"on_each_device": bytes_of(shapes)[1]},
    )


def inference_macs(config: ConfigDict) -> Counter[Key]:
    """Multiply-adds of one image in one call of the denoiser of `config`, resolved, without guidance."""
    return _Traced(config).inference()


def training_macs(config: ConfigDict) -> Counter[Key]:
    """Multiply-adds of one image in the loss of `config`, resolved, at its first mask ratio."""
    return _Traced(config).training()


def activation_bytes(config: ConfigDict) -> Counter[Key]:
    """Bytes that the backward pass of one image keeps, of `config`, resolved.

    Those of kind ATTENTION are not kept where one kernel computes attention: on a GPU in bfloat16.
    """
    return _Traced(config).activations(compute_of(config))


def train_flops_per_image(config: ConfigDict) -> int:
    """Floating point operations of one image in a training step of `config`, resolved, as MFU counts them.

    Three times the products of the loss at the first mask ratio; what is computed again is not counted.
    """
    return FLOPS_PER_MAC * STEP_OVER_LOSS * training_macs(config).total()


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


class _Traced:
    """The functions of a configuration's method, of one image, to be traced on shapes."""

    def __init__(self, config: ConfigDict):
        self.method, self.data = method_of(config), shape_of(config)
        self.num_keep = self.method.num_keep(self.data, 0, config.training.num_steps)
        image = (1, self.data.image_size, self.data.image_size, self.data.channels)
        self.clean = jax.ShapeDtypeStruct(image, jnp.float32)
        self.labels = jax.ShapeDtypeStruct((1,), jnp.int32)
        self.sigma = jax.ShapeDtypeStruct((1,), jnp.float32)
        # One program for all products: in bfloat16 a GPU computes attention in one kernel, which has no
        # products to be counted.
        self.plain = replace(compute_of(config), precision="float32", remat="none")
        self.params = jax.eval_shape(lambda: init_params(self.method, self.data, self.plain, 0))
        self.draws = jax.eval_shape(
            lambda clean, labels: self.method.draw(
                jax.random.key(0), {"clean": clean, "labels": labels}, self.num_keep
            ),
            self.clean,
            self.labels,
        )

    def loss(self, compute: Compute) -> Callable[[Params, Draws], jax.Array]:
        graph = network_graph(self.method, self.data, compute)
        return lambda params, draws: self.method.loss(nnx.merge(graph, params), draws)[0].mean()

    def inference(self) -> Counter[Key]:
        graph = network_graph(self.method, self.data, self.plain)

        def denoise(params, noisy, sigma, labels):
            return self.method.denoiser(nnx.merge(graph, params))(noisy, sigma, labels)

        return trace_products(denoise, self.params, self.clean, self.sigma, self.labels).macs

    def training(self) -> Counter[Key]:
        return trace_products(self.loss(self.plain), self.params, self.draws).macs

    def gradient(self, remat: str) -> int:
        compute = replace(self.plain, remat=remat)
        return trace_products(jax.grad(self.loss(compute)), self.params, self.draws).macs.total()

    def activations(self, compute: Compute) -> Counter[Key]:
        """What the backward pass needs of the forward pass and that takes a product to compute again.

        Operands and results of products, inputs of blocks and named arrays, in bytes; a compiler computes
        the rest again where it is needed.
        """
        loss = self.loss(compute)

        def backward(params, draws):
            return jax.vjp(lambda params: loss(params, draws), params)[1]

        kept: Counter[Key] = Counter()
        for tensor in frozenset().union(*trace_products(backward, self.params, self.draws).kept):
            kept[Key(tensor.part, tensor.kind)] += tensor.size
        return kept
