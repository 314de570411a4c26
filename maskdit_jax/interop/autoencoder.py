"""The Stable Diffusion autoencoder: our paths are the keys of diffusers' AutoencoderKL."""

import re
from typing import Any

import numpy as np

from maskdit_jax.interop.tables import Shapes, count_blocks, dimensions, read_depth

# Beyond every autoencoder that exists, as tables.MAX_DEPTH.
MAX_LEVELS, MAX_RESNETS = 8, 32
# The other names its tensors go by, in older diffusers files (attention) and in CompVis' autoencoder_kl.pth.
_ALIASES = [
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


def rename(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An autoencoder's tensors as diffusers stores them today."""
    levels = count_blocks(tensors, "decoder.up.")

    def renamed_key(key: str) -> str:
        # CompVis numbers the decoder's levels from the image down, diffusers from the latents up.
        key = re.sub(r"^decoder\.up\.(\d)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", key)
        for alias, name in _ALIASES:
            key = re.sub(alias, name, key)
        return key

    renamed = {}
    for key, value in tensors.items():
        name = renamed_key(key)
        if name in renamed:
            raise ValueError(f"{key} is there twice, under two names")
        # The linear maps of CompVis' attention are 1×1 convolutions.
        is_map = ".attentions." in name and value.shape[2:] == (1, 1)
        renamed[name] = value[:, :, 0, 0] if is_map else value
    return renamed


def read_options(shapes: Shapes) -> dict[str, Any]:
    """Options of the `AutoencoderKL` whose tensors, as diffusers stores them, have these shapes.

    Raises:
      KeyError: a tensor that decides is missing.
      ValueError: one has a shape that no AutoencoderKL has.
    """
    levels = range(read_depth(shapes, "encoder.down_blocks.", MAX_LEVELS))
    first_conv = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    return {
        "image_channels": dimensions(shapes, "encoder.conv_in.weight", 4)[1],
        "latent_channels": dimensions(shapes, "post_quant_conv.weight", 4)[0],
        "block_out_channels": tuple(dimensions(shapes, first_conv.format(i), 4)[0] for i in levels),
        "layers_per_block": read_depth(shapes, "encoder.down_blocks.0.resnets.", MAX_RESNETS),
    }


def to_torch(params: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Tensors, as diffusers stores them, of parameters of `AutoencoderKL`."""
    tensors: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, dict):
            tensors |= to_torch(value, f"{prefix}{name}.")
        elif name == "kernel":
            tensors[f"{prefix}weight"] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        else:
            tensors[f"{prefix}{'weight' if name == 'scale' else name}"] = value
    return tensors


def from_torch(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
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
