"""Attention, MLP, the transformer block with adaLN-Zero, and a stacked run of blocks of any kind."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maskdit_jax.models.compute import Compute, chosen
from maskdit_jax.models.embed import Linear, xavier_uniform

Activation = Callable[[jax.Array], jax.Array]
# What is added to the scaled scores of an attention, [B or 1, h, N, N] float32; made where it is used.
Bias = Callable[[], jax.Array]
MLP_RATIO = 4
NORM_EPS = 1e-6  # PyTorch's default is 1e-5, with which published weights would give other images
# What the "mlp" policy keeps; only fc1's output and the GELU are computed again.
_SAVED_NAMES = ("qkv", "attention", "projection", "residual", "fc2")


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """LN(x)·(1 + scale) + shift for x [B, N, D], shift and scale [B, D]; the arithmetic is float32."""
    x32 = jax.nn.standardize(x.astype(jnp.float32), epsilon=NORM_EPS)
    return (x32 * (1 + scale[:, None].astype(jnp.float32)) + shift[:, None]).astype(x.dtype)


def _save_only_input(activation: Activation) -> Activation:
    """The same function; for the backward pass it saves nothing but its input."""

    @jax.custom_vjp
    def forward(x):
        return activation(x)

    def backward(x, gradient):
        # In float32: in the type of x, XLA would find the forward pass's products here again and keep them,
        # 41 MB for an image of XL/2, instead of folding bias and GELU into the matrix product before them.
        derivative = jax.vjp(activation, x.astype(jnp.float32))[1](gradient.astype(jnp.float32))[0]
        return (derivative.astype(x.dtype),)

    forward.defvjp(lambda x: (forward(x), x), backward)
    return forward


gelu = _save_only_input(functools.partial(jax.nn.gelu, approximate=True))
exact_gelu = _save_only_input(functools.partial(jax.nn.gelu, approximate=False))


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: Bias | None = None,
    *,
    fused: bool = False,
) -> jax.Array:
    """Softmax attention, [B, N, h, d] each → [B, N, h, d]; softmax in float32.

    `fused`: cuDNN's kernel where it applies (16-bit, head size a multiple of 8 up to 128, no bias);
    elsewhere batched matrix products over [B·h, N, d], which a CPU runs at matmul speed.
    """
    head_size = query.shape[-1]
    if not fused:
        return _attend_by_products(query, key, value, bias)
    if bias is not None:
        # cuDNN's kernel computes no gradient of a bias that is another for each sample. As with that kernel
        # nothing of size [B, h, N, N] is kept for the backward pass, neither weights nor bias.
        products = jax.checkpoint(functools.partial(_attend_by_products, bias=bias))
        return products(query, key, value)
    if query.dtype in (jnp.bfloat16, jnp.float16) and head_size % 8 == 0 and head_size <= 128:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    return _attend_by_products(query, key, value)


def _attend_by_products(query, key, value, bias=None):
    batch, tokens, heads, head_size = query.shape

    def flatten(x):
        return x.transpose(0, 2, 1, 3).reshape(batch * heads, tokens, head_size)

    query, key, value = flatten(query * head_size**-0.5), flatten(key), flatten(value)
    logits = jax.lax.batch_matmul(query, key.transpose(0, 2, 1)).astype(jnp.float32)
    if bias is not None:
        logits = (logits.reshape(batch, heads, tokens, tokens) + bias()).reshape(logits.shape)
    # Divided by the row sum after the product with V: [N, d] divisions instead of [N, N].
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = jax.lax.batch_matmul(weights.astype(value.dtype), value)
    out = (out / weights.sum(-1, keepdims=True)).astype(value.dtype)
    return out.reshape(batch, heads, tokens, head_size).transpose(0, 2, 1, 3)


class Attention(nnx.Module):
    """Multi-head self-attention, [B, N, D] → [B, N, D].

    qkv_bias: "all", "qv" (queries and values have a learned bias, keys have none) or "none".
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qkv_bias: str = "all",
        kernel_init: nnx.Initializer = xavier_uniform,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.fused = False  # a stack of blocks knows, and sets it
        linear = functools.partial(Linear, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.qkv = linear(width, 3 * width, use_bias=qkv_bias == "all")
        self.projection = linear(width, width)
        self.q_bias = self.v_bias = nnx.data(None)
        if qkv_bias == "qv":
            self.q_bias, self.v_bias = nnx.Param(jnp.zeros(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array, bias: Bias | None = None) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = jnp.concatenate([self.q_bias[...], jnp.zeros(width), self.v_bias[...]])
            qkv = qkv + qkv_bias.astype(qkv.dtype)[None, None]
        qkv = checkpoint_name(qkv, "qkv").reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        out = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], bias, fused=self.fused).reshape(x.shape)
        return checkpoint_name(self.projection(checkpoint_name(out, "attention")), "projection")


class MLP(nnx.Module):
    """Linear D → ratio·D, GELU (tanh-approximated unless told otherwise), Linear ratio·D → D."""

    def __init__(
        self,
        width: int,
        *,
        ratio: float = MLP_RATIO,
        activation: Activation = gelu,
        kernel_init: nnx.Initializer = xavier_uniform,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(Linear, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.activation = activation
        self.fc1 = linear(width, int(ratio * width))
        self.fc2 = linear(int(ratio * width), width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return checkpoint_name(self.fc2(self.activation(self.fc1(x))), "fc2")


class Modulation(nnx.Module):
    """`parts` vectors [B, D] = Linear(SiLU(c)), zero at initialisation (adaLN-Zero; DiT, sec. 3.2)."""

    def __init__(self, condition_size: int, width: int, parts: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.parts = parts
        self.linear = Linear(condition_size, parts * width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, c: jax.Array) -> list[jax.Array]:
        return jnp.split(self.linear(jax.nn.silu(c)), self.parts, axis=-1)


class Block(nnx.Module):
    """Transformer block with adaLN-Zero: x [B, N, D], c [B, C], bias of the attention → [B, N, D]."""

    def __init__(self, width: int, num_heads: int, condition_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.modulation = Modulation(condition_size, width, 6, dtype=dtype, rngs=rngs)
        self.attention = Attention(width, num_heads, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, bias: Bias | None = None) -> jax.Array:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        x = x + gate1[:, None] * self.attention(modulated_norm(x, shift1, scale1), bias)
        x = checkpoint_name(x, "residual")
        return x + gate2[:, None] * self.mlp(modulated_norm(x, shift2, scale2))


class ModulatedLinear(nnx.Module):
    """LN, modulate from c, Linear: the bridge to the decoder and the output layer; zero at initialisation."""

    def __init__(self, width: int, condition_size: int, out_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.modulation = Modulation(condition_size, width, 2, dtype=dtype, rngs=rngs)
        self.linear = Linear(width, out_size, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        return self.linear(modulated_norm(x, *self.modulation(c)))


class BlockStack(nnx.Module):
    """`depth` blocks whose parameters are stacked along a leading axis, applied by one `lax.scan`.

    make_block(rngs) is one block, a module called as block(x, *context) or block(x, *context, own).
    compute.unroll: "full" (fastest on a GPU: a rolled loop copies every saved tensor into a stack),
    "none" (compiles fastest) or "auto": full on a GPU, none elsewhere.
    compute.remat: "none" saves every activation, "mlp" computes fc1 and the GELU again in the backward
    pass, "full" saves only the input of each block.
    """

    def __init__(
        self, make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, *, compute: Compute, rngs: nnx.Rngs
    ):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
        def stack(rngs: nnx.Rngs) -> nnx.Module:
            return make_block(rngs)

        self.remat, self.unroll = compute.remat, chosen(compute.unroll, "full")
        self.layers = stack(rngs)
        fused = chosen(compute.attention, "cudnn")
        self.layers.set_attributes(Attention, fused=fused, raise_if_not_found=False)

    def __call__(
        self,
        x: jax.Array,
        *context: Any,
        own: jax.Array | None = None,
        start: int = 0,
        stop: int | None = None,
        emit: bool = False,
    ) -> Any:
        """Apply the blocks start … stop - 1, by default all of them, to x [B, N, D].

        Every block gets the `context`; block i gets own[i - start] besides, where `own`, such as skips
        [stop - start, B, N, D], is given. With `emit` also what each block returned, [stop - start, B, N, D].
        """
        graphdef, params = nnx.split(self.layers)
        if start or stop is not None:
            params = jax.tree.map(lambda p: p[start:stop], params)

        def body(x, inputs):
            block_params, mine = inputs
            out = nnx.merge(graphdef, block_params)(x, *context, *([] if own is None else [mine]))
            return out, out if emit else None

        if self.remat != "none":
            policies = jax.checkpoint_policies
            policy = (
                policies.save_only_these_names(*_SAVED_NAMES)
                if self.remat == "mlp"
                else policies.nothing_saveable
            )
            # Outside a rolled loop XLA would merge the recomputation with the forward pass.
            body = jax.checkpoint(body, policy=policy, prevent_cse=self.unroll)
        x, emitted = jax.lax.scan(body, x, (params, own), unroll=self.unroll)
        return (x, emitted) if emit else x
