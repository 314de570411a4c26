"""One table for MaskDiT: our path ↔ torch key, with the change of layout.

Works on numpy arrays, jax arrays and, under `jax.eval_shape`, on shapes. A missing or unexpected
key is a KeyError that names it.
"""

from typing import Any

import jax.numpy as jnp

from maskdit_jax.models.embed import position_table

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
            before = key.partition("{i}")[0]
            count = len({k.removeprefix(before).split(".")[0] for k in rest if k.startswith(before)})
            parts = [_leaf_from_torch(rest, key.format(i=i), layout, patch_size) for i in range(count)]
            leaf = {name: jnp.stack([p[name] for p in parts]) for name in parts[0]} if parts else None
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
