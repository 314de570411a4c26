"""One table for each model: our path ↔ torch key, with the change of layout.

`to_torch` works on numpy arrays, jax arrays and, under `jax.eval_shape`, on shapes; what comes from torch
is numpy arrays. A missing or unexpected key is a KeyError that names it.
"""

import math
import re
from collections.abc import Collection
from typing import Any

import numpy as np

from maskdit_jax.log import counted
from maskdit_jax.models.embed import position_table
from maskdit_jax.models.maskdit import SIZES

# Our path, torch key, layout. {i} numbers the blocks of a stack, which are one array here.
_BLOCK = [
    ("modulation.linear", "adaLN_modulation.1", "linear"),
    ("attention.qkv", "attn.qkv", "linear"),
    ("attention.projection", "attn.proj", "linear"),
    ("mlp.fc1", "mlp.fc1", "linear"),
    ("mlp.fc2", "mlp.fc2", "linear"),
]
_MODULATED_LINEAR = [
    ("modulation.linear", "adaLN_modulation.1", "linear"),
    ("linear", "linear", "linear"),
]
TABLE = [
    ("mask_token", "model.mask_token", "token"),
    ("patch_embedding", "model.x_embedder.proj", "patch map"),
    ("noise_embedding.fc1", "model.t_embedder.mlp.0", "linear"),
    ("noise_embedding.fc2", "model.t_embedder.mlp.2", "linear"),
    ("label_embedding.table", "model.y_embedder.embedding_table.weight", "label table"),
    *((f"encoder.layers.{a}", f"model.blocks.{{i}}.{b}", c) for a, b, c in _BLOCK),
    *((f"bridge.{a}", f"model.decoder_layer.{b}", c) for a, b, c in _MODULATED_LINEAR),
    *((f"decoder.layers.{a}", f"model.decoder_blocks.{{i}}.{b}", c) for a, b, c in _BLOCK),
    *((f"output.{a}", f"model.final_layer.{b}", c) for a, b, c in _MODULATED_LINEAR),
]


Shapes = dict[str, tuple[int, ...]]
# Beyond every network that exists; a file of many tiny tensors shall not make us build what it names.
MAX_DEPTH, MAX_LEVELS, MAX_RESNETS = 1_000, 8, 32


def read_options(shapes: Shapes) -> dict[str, Any]:
    """Options of the `MaskDiT` whose torch tensors have these shapes, all but its numbers of heads.

    Only the tensors that decide are looked at: the caller compares the rest with what `to_torch`
    gives for the options.

    Raises:
      KeyError: a tensor that decides is missing.
      ValueError: one has a shape that no MaskDiT has.
    """
    hidden_size, channels, patch_size, other_side = _rank(shapes, "model.x_embedder.proj.weight", 4)
    _, num_tokens, position_width = _rank(shapes, "model.pos_embed", 3)
    grid = math.isqrt(num_tokens)
    if patch_size != other_side or grid**2 != num_tokens or not grid or hidden_size % 4:
        raise ValueError(
            f"patches of {patch_size}×{other_side}, {num_tokens} positions, width {hidden_size}: expected "
            "square patches, a square number of positions (class tokens are not supported) and a width "
            "that 4 divides"
        )
    _same_width("model.pos_embed", position_width, hidden_size)
    has_labels = "model.y_embedder.embedding_table.weight" in shapes
    options = {
        "image_size": grid * patch_size,
        "channels": channels,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": _depth(shapes, "model.blocks.", MAX_DEPTH),
        "num_classes": _rank(shapes, "model.y_embedder.embedding_table.weight", 2)[1] if has_labels else 0,
        "use_decoder": any(key.startswith("model.decoder_") for key in shapes),
        "use_mask_token": "model.mask_token" in shapes,
    }
    if options["use_decoder"]:
        options["decoder_hidden_size"] = width = _rank(shapes, "model.decoder_layer.linear.weight", 2)[0]
        options["decoder_depth"] = _depth(shapes, "model.decoder_blocks.", MAX_DEPTH)
        _same_width("model.decoder_pos_embed", _rank(shapes, "model.decoder_pos_embed", 3)[2], width)
    return options


def model_name(options: dict[str, Any]) -> str:
    """Such as "MaskDiT-XL/2", or "DiT-XL/2" without decoder; for other sizes the numbers in words."""
    family = "MaskDiT" if options["use_decoder"] else "DiT"
    for size, (depth, hidden_size, _) in SIZES.items():
        if (depth, hidden_size) == (options["depth"], options["hidden_size"]):
            return f"{family}-{size}/{options['patch_size']}"
    return f"{family} of {counted(options['depth'], 'block')} of width {options['hidden_size']}"


def to_torch(params: dict[str, Any], *, image_size: int, patch_size: int) -> dict[str, Any]:
    """Torch tensors of our parameters, the fixed position tables included; keys as in the authors' file."""
    grid = image_size // patch_size
    width = params["patch_embedding"]["kernel"].shape[1]
    tensors = {"model.pos_embed": position_table(width, grid)[None]}
    if "decoder" in params:
        width = params["bridge"]["linear"]["kernel"].shape[1]
        tensors["model.decoder_pos_embed"] = position_table(width, grid)[None]
    for path, key, layout in TABLE:
        leaf = _find(params, path)
        if leaf is None:
            continue
        stack = range(leaf["kernel"].shape[0]) if "{i}" in key else [...]
        for i in stack:
            for suffix, value in _leaf_to_torch(leaf, layout, i, patch_size).items():
                tensors[key.format(i=i) + suffix] = value
    return tensors


def from_torch(tensors: dict[str, Any], *, patch_size: int) -> dict[str, Any]:
    """Our parameters from torch tensors; the position tables in them are not parameters and are left out."""
    rest = {k: v for k, v in tensors.items() if not k.endswith("pos_embed")}
    params: dict[str, Any] = {}
    for path, key, layout in TABLE:
        if "{i}" in key:
            count = _count(rest, key.partition("{i}")[0])
            parts = [_leaf_from_torch(rest, key.format(i=i), layout, patch_size) for i in range(count)]
            leaf = {name: np.stack([p[name] for p in parts]) for name in parts[0]} if parts else None
        else:
            present = any(k == key or k.startswith(key + ".") for k in rest)
            leaf = _leaf_from_torch(rest, key, layout, patch_size) if present else None
        if leaf is not None:
            *parents, last = path.split(".")
            node = params
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = leaf
    if rest:
        raise KeyError(f"unexpected torch keys: {', '.join(sorted(rest))}")
    return params


def _rank(shapes: Shapes, key: str, rank: int) -> tuple[int, ...]:
    if len(shapes[key]) != rank:
        raise ValueError(f"{key} has shape {list(shapes[key])}, expected {rank} dimensions")
    return shapes[key]


def _same_width(key: str, width: int, expected: int) -> None:
    """The table to compare with has the network's width, which must be that of the one in the file."""
    if width != expected:
        raise ValueError(f"{key} has width {width}, expected {expected}")


def _count(keys: Collection[str], prefix: str) -> int:
    """Number of the blocks under `prefix`; a gap counts, so that what is missing can be named."""
    names = {key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)}
    # Of names such as 07, or in other scripts, there would be two for one number.
    numbers = [int(name) for name in names if len(name) < 5 and re.fullmatch("0|[1-9][0-9]*", name)]
    # A lone huge number is no block, but an unexpected key.
    return max((n + 1 for n in numbers if n < len(keys)), default=0)


def _depth(keys: Collection[str], prefix: str, at_most: int) -> int:
    count = _count(keys, prefix)
    if not count:
        raise KeyError(f"{prefix}0")
    if count > at_most:
        raise ValueError(f"it has {count:,} of {prefix}…, at most {at_most:,} are possible")
    return count


def _find(params, path):
    for name in path.split("."):
        params = params.get(name)
        if params is None:
            return None
    return params


def _leaf_to_torch(leaf, layout, index, patch_size):
    if layout == "token":
        return {"": leaf[None, None]}
    if layout == "label table":
        return {"": leaf.T}
    kernel, bias = leaf["kernel"][index], leaf["bias"][index]
    if layout == "patch map":  # [(p q c), D] → [D, c, p, q]
        kernel = kernel.reshape(patch_size, patch_size, -1, kernel.shape[-1]).transpose(3, 2, 0, 1)
        return {".weight": kernel, ".bias": bias}
    return {".weight": kernel.T, ".bias": bias}


def _leaf_from_torch(tensors, key, layout, patch_size):
    if layout == "token":
        return tensors.pop(key)[0, 0]
    if layout == "label table":
        return tensors.pop(key).T
    weight, bias = tensors.pop(key + ".weight"), tensors.pop(key + ".bias")
    if layout == "patch map":
        return {"kernel": weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0]), "bias": bias}
    return {"kernel": weight.T, "bias": bias}


# The autoencoder: our paths are the keys of diffusers' AutoencoderKL; these are the other names its
# tensors go by, in older diffusers files (attention) and in CompVis' autoencoder_kl.pth.
_AUTOENCODER_ALIASES = [
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.attentions\.0\.(?:query|q)\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.(?:key|k)\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.(?:value|v)\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.(?:proj_attn|proj_out)\.", ".attentions.0.to_out.0."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
]


def rename_autoencoder(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An autoencoder's tensors as diffusers stores them today."""
    levels = _count(tensors, "decoder.up.")

    def rename(key: str) -> str:
        # CompVis numbers the decoder's levels from the image down, diffusers from the latents up.
        key = re.sub(r"^decoder\.up\.(\d)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", key)
        for alias, name in _AUTOENCODER_ALIASES:
            key = re.sub(alias, name, key)
        return key

    renamed = {}
    for key, value in tensors.items():
        name = rename(key)
        if name in renamed:
            raise ValueError(f"{key} is there twice, under two names")
        # The linear maps of CompVis' attention are 1×1 convolutions.
        is_map = ".attentions." in name and value.shape[2:] == (1, 1)
        renamed[name] = value[:, :, 0, 0] if is_map else value
    return renamed


def read_autoencoder_options(shapes: Shapes) -> dict[str, Any]:
    """Options of the `AutoencoderKL` whose tensors, as diffusers stores them, have these shapes.

    Raises:
      KeyError: a tensor that decides is missing.
      ValueError: one has a shape that no AutoencoderKL has.
    """
    levels = range(_depth(shapes, "encoder.down_blocks.", MAX_LEVELS))
    first_conv = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    return {
        "image_channels": _rank(shapes, "encoder.conv_in.weight", 4)[1],
        "latent_channels": _rank(shapes, "post_quant_conv.weight", 4)[0],
        "block_out_channels": tuple(_rank(shapes, first_conv.format(i), 4)[0] for i in levels),
        "layers_per_block": _depth(shapes, "encoder.down_blocks.0.resnets.", MAX_RESNETS),
    }


def autoencoder_to_torch(params: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Tensors, as diffusers stores them, of parameters of `AutoencoderKL`."""
    tensors: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, dict):
            tensors |= autoencoder_to_torch(value, f"{prefix}{name}.")
        elif name == "kernel":
            tensors[f"{prefix}weight"] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        else:
            tensors[f"{prefix}{'weight' if name == 'scale' else name}"] = value
    return tensors


def autoencoder_from_torch(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `AutoencoderKL` from its tensors as diffusers stores them."""
    params: dict[str, Any] = {}
    for key, value in tensors.items():
        *parents, name = key.split(".")
        if name == "weight":
            name = "scale" if value.ndim == 1 else "kernel"
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        node: dict[Any, Any] = params
        for parent in parents:
            node = node.setdefault(int(parent) if parent.isdecimal() else parent, {})
        node[name] = value
    return params
