"""MaskDM's U-ViT: the names of its tensors in the authors' files."""

import math
from typing import Any

import jax.numpy as jnp

from maskdit_jax.interop import tables
from maskdit_jax.interop.tables import (
    Shapes,
    dimensions,
    find,
    named_size,
    place,
    published_heads,
    read_depth,
)
from maskdit_jax.models.sizes import size_name
from maskdit_jax.models.uvit import PATCH_SIZES, SIZES

FAMILY, PAPER = "MaskDM", "https://arxiv.org/abs/2306.11363"
PATCH_MAP = "encoder.patch_embed.proj.weight"
TORCH_NETWORK = "the network of the architecture above"
PUBLISHED_DATA = {"space": "pixels", "latent_scale": 1.0}
UNTOLD = ()
_BLOCK = [
    ("norm1", "norm1", "norm"),
    ("attention.q_bias", "attn.q_bias", "array"),
    ("attention.v_bias", "attn.v_bias", "array"),
    ("attention.qkv.kernel", "attn.qkv.weight", "transposed"),
    ("attention.projection", "attn.proj", "linear"),
    ("norm2", "norm2", "norm"),
    ("mlp.fc1", "mlp.fc1", "linear"),
    ("mlp.fc2", "mlp.fc2", "linear"),
]
TABLE = [
    ("label_embedding.null", "encoder.uncond_embed", "row"),
    ("patch_embedding", "encoder.patch_embed.proj", "patch map"),
    ("time_embedding.fc1", "encoder.time_embed.0", "linear"),
    ("time_embedding.fc2", "encoder.time_embed.2", "linear"),
    ("label_embedding.table", "encoder.label_emb.weight", "array"),
    *((f"in_blocks.layers.{a}", f"encoder.in_blocks.{{i}}.{b}", c) for a, b, c in _BLOCK),
    *((f"middle.layers.{a}", f"encoder.mid_block.{b}", c) for a, b, c in _BLOCK),
    *((f"out_blocks.layers.{a}", f"encoder.out_blocks.{{i}}.{b}", c) for a, b, c in _BLOCK),
    ("out_blocks.layers.skip", "encoder.out_blocks.{i}.skip_linear", "linear"),
    ("norm", "encoder.norm", "norm"),
    ("output", "encoder_to_output", "linear"),
]
# One table there, of extra tokens and patches; ours apart, so that another network can take some of them.
POSITIONS = "encoder.encoder_pos_embed"
EXTRA_POSITIONS = ("label_embedding.position", "time_position")
PATCH_POSITIONS = "positions.table"


def recognises(shapes: Shapes) -> bool:
    """Whether tensors of these shapes are meant to be a U-ViT of MaskDM."""
    return any(key == POSITIONS or key.startswith("encoder.in_blocks.") for key in shapes)


def read_options(shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Options of the network and its data, all but its number of heads; see `Layout`."""
    width, channels, patch_size, other_side = dimensions(shapes, PATCH_MAP, 4)
    has_labels = "encoder.label_emb.weight" in shapes
    num_tokens = dimensions(shapes, POSITIONS, 3)[1] - (2 if has_labels else 1)
    grid = math.isqrt(max(num_tokens, 0))
    if patch_size != other_side or grid**2 != num_tokens or not grid or width % 4:
        raise ValueError(
            f"patches of {patch_size}×{other_side}, {num_tokens} positions beside the extra tokens', width "
            f"{width}: expected square patches, a square number of positions and a width that 4 divides"
        )
    half = read_depth(shapes, "encoder.in_blocks.")
    network: dict[str, Any] = {
        "hidden_size": width,
        # Of one more or fewer there are as many blocks: what was published decides.
        "depth": next((d for d, w, _ in SIZES.values() if (d // 2, w) == (half, width)), 2 * half + 1),
        "patch_size": patch_size,
        "mlp_ratio": _ratio(dimensions(shapes, "encoder.mid_block.mlp.fc1.weight", 2)[0], width),
        "qkv_bias": "encoder.mid_block.attn.q_bias" in shapes,
        "time_mlp": "encoder.time_embed.0.weight" in shapes,
    }
    network["size"] = named_size(network, SIZES, PATCH_SIZES)
    num_classes = dimensions(shapes, "encoder.label_emb.weight", 2)[0] if has_labels else 0
    data = {"image_size": grid * patch_size, "channels": channels, "num_classes": num_classes}
    return {"network": network, "data": data}


def _ratio(inner: int, width: int) -> float:
    """The ratio of which `int(ratio * width)` is the inner width of an MLP."""
    ratio = inner / width
    return ratio if int(ratio * width) == inner else math.nextafter(ratio, math.inf)


def heads(network: Any) -> dict[str, tuple[int, int]]:
    """Heads of the published networks; see `Layout`."""
    return published_heads(network, SIZES)


def method_options(network: Any) -> dict[str, Any]:
    """Nothing but the defaults is known."""
    return {}


def to_torch(params: dict[str, Any], network: Any, data: Any) -> dict[str, Any]:
    """Torch tensors of our parameters; keys as in the authors' file."""
    extra = [row for path in EXTRA_POSITIONS if (row := find(params, path)) is not None]
    positions = jnp.concatenate([*(row[None] for row in extra), find(params, PATCH_POSITIONS)])
    return {POSITIONS: positions[None]} | tables.to_torch(params, TABLE, network.patch_size)


def from_torch(tensors: dict[str, Any], network: Any) -> dict[str, Any]:
    """Our parameters from torch tensors."""
    rest = dict(tensors)
    positions = rest.pop(POSITIONS)[0]
    params = tables.from_torch(rest, TABLE, network.patch_size)
    extra = EXTRA_POSITIONS[0 if "label_embedding" in params else 1 :]
    for path, row in zip((*extra, PATCH_POSITIONS), (*positions[: len(extra)], positions[len(extra) :])):
        place(params, path, row)
    return params


def fixed_tensors(network: Any, data: Any) -> dict[str, Any]:
    """None: its positions are learned."""
    return {}


def model_name(network: Any) -> str:
    """Such as "MaskDM-B/4"; for other sizes the numbers in words."""
    size = size_name(network, SIZES)
    if size is not None:
        return f"{FAMILY}-{size}"
    return f"{FAMILY} of {2 * (network.depth // 2) + 1} blocks of width {network.hidden_size}"


def traits(network: Any) -> list[str]:
    """What few such networks have."""
    biased = ["biased queries and values"] if network.qkv_bias else []
    return biased + (["time through an MLP"] if network.time_mlp else [])


def describe(method: Any, data: Any) -> dict[str, str]:
    """Rows of the model card: blocks, how time and classes enter, what is predicted."""
    n, classes = method.network, data.num_classes
    half = n.depth // 2
    return {
        "Blocks": f"{half} + 1 + {half} with long skips, width {n.hidden_size}, {n.num_heads} heads, MLP "
        + ", ".join([f"{n.mlp_ratio:g} times as wide", *traits(n)]),
        "Time": "a token in front of the patches: its integer's sinusoid",
        "Classes": f"{classes}, one token in front of the time; no class is a learned token"
        if classes
        else "unconditional",
        "Prediction": f"the noise, DDPM of {method.timesteps:,} timesteps, {method.noise_schedule} schedule",
    }
