"""What the tables of PyTorch names share: rows of our path, torch key and layout, applied in both directions.

`to_torch` works on numpy arrays, jax arrays and, under `jax.eval_shape`, on shapes; what comes from torch
is numpy arrays. A missing or unexpected key is a KeyError that names it.
"""

import math
import re
from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskdit_jax.models.mdt import UNUSED_ROWS
from maskdit_jax.models.sizes import CUSTOM, Sizes, size_name

Shapes = dict[str, tuple[int, ...]]
# Our path, torch key, layout. {i} numbers the blocks of a stack, which are one array here.
Row = tuple[str, str, str]
# Beyond every network that exists; a file of many tiny tensors shall not make us build what it names.
MAX_DEPTH = 1_000

# A parameter alone: to torch, and back.
_ARRAYS = {
    "array": (lambda x: x, lambda x: x),
    "transposed": (lambda x: x.T, lambda x: x.T),
    "row": (lambda x: x[None], lambda x: x[0]),  # [D] ↔ [1, D]
    "token": (lambda x: x[None, None], lambda x: x[0, 0]),  # [D] ↔ [1, 1, D]
}


def to_torch(params: dict[str, Any], table: Iterable[Row], patch_size: int) -> dict[str, Any]:
    """Torch tensors of our parameters, by the rows of a table that the network has."""
    tensors = {}
    for path, key, layout in table:
        leaf = find(params, path)
        if leaf is None:
            continue
        is_stack = ".layers." in path
        for i, block in enumerate(_unstack(leaf) if is_stack else [leaf]):
            for suffix, value in _leaf_to_torch(block, layout, patch_size).items():
                tensors[key.format(i=i) + suffix] = value
    return tensors


def from_torch(tensors: dict[str, Any], table: Iterable[Row], patch_size: int) -> dict[str, Any]:
    """Our parameters from torch tensors, by the rows of a table.

    Raises:
      KeyError: a tensor is missing or unexpected.
    """
    rest = dict(tensors)
    params: dict[str, Any] = {}
    for path, key, layout in table:
        count = count_blocks(tensors, key.partition("{i}")[0]) if "{i}" in key else 1
        keys = [key.format(i=i) for i in range(count)]
        if not any(name + suffix in rest for name in keys for suffix in ("", ".weight", ".bias")):
            continue
        leaves = [_leaf_from_torch(rest, name, layout, patch_size) for name in keys]
        leaf = jax.tree.map(lambda *x: np.stack(x), *leaves) if ".layers." in path else leaves[0]
        place(params, path, leaf)
    if rest:
        raise KeyError(f"unexpected torch keys: {', '.join(sorted(rest))}")
    return params


def find(params: dict[str, Any], path: str) -> Any:
    """The parameters at a path such as "encoder.layers.mlp.fc1"; None where there are none."""
    node: Any = params
    for name in path.split("."):
        node = node.get(name)
        if node is None:
            return None
    return node


def place(params: dict[str, Any], path: str, leaf: Any) -> None:
    """Put parameters at a path."""
    *parents, last = path.split(".")
    for name in parents:
        params = params.setdefault(name, {})
    params[last] = leaf


def dimensions(shapes: Shapes, key: str, expected: int) -> tuple[int, ...]:
    """Shape of a tensor that has so many dimensions."""
    if len(shapes[key]) != expected:
        raise ValueError(f"{key} has shape {list(shapes[key])}, expected {expected} dimensions")
    return shapes[key]


def same_width(key: str, width: int, expected: int) -> None:
    """The table to compare with has the network's width, which must be that of the one in the file."""
    if width != expected:
        raise ValueError(f"{key} has width {width}, expected {expected}")


def count_blocks(keys: Collection[str], prefix: str) -> int:
    """Number of the blocks under `prefix`; a gap counts, so that what is missing can be named."""
    names = {key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)}
    # Of names such as 07, or in other scripts, there would be two for one number.
    numbers = [int(name) for name in names if len(name) < 5 and re.fullmatch("0|[1-9][0-9]*", name)]
    # A lone huge number is no block, but an unexpected key.
    return max((n + 1 for n in numbers if n < len(keys)), default=0)


def read_depth(keys: Collection[str], prefix: str, at_most: int = MAX_DEPTH) -> int:
    """Number of the blocks under `prefix`, from one to `at_most`."""
    count = count_blocks(keys, prefix)
    if not count:
        raise KeyError(f"{prefix}0")
    if count > at_most:
        raise ValueError(f"it has {count:,} of {prefix}…, at most {at_most:,} are possible")
    return count


def read_patches(shapes: Shapes, patch_map: str, positions: str) -> tuple[int, int, int, int]:
    """Width, channels, patch size and patches per side, of a patch map and a table of positions."""
    width, channels, patch_size, other_side = dimensions(shapes, patch_map, 4)
    _, num_tokens, position_width = dimensions(shapes, positions, 3)
    grid = math.isqrt(num_tokens)
    if patch_size != other_side or grid**2 != num_tokens or not grid or width % 4:
        raise ValueError(
            f"patches of {patch_size}×{other_side}, {num_tokens} positions, width {width}: expected "
            "square patches, a square number of positions (class tokens are not supported) and a width "
            "that 4 divides"
        )
    same_width(positions, position_width, width)
    return width, channels, patch_size, grid


def published_heads(network: Any, sizes: Sizes) -> dict[str, tuple[int, int]]:
    """What `Layout.heads` says of a network's one stack of blocks."""
    published = {(depth, width): heads for depth, width, heads in sizes.values()}
    return {"num_heads": (published.get((network.depth, network.hidden_size), 0), network.hidden_size)}


def named_size(network: dict[str, Any], sizes: Sizes, patch_sizes: Collection[int]) -> str:
    """The option `size` of a network with these options, such as "XL/2" or "custom"."""
    name = size_name(SimpleNamespace(**network), sizes)
    return name if name is not None and network["patch_size"] in patch_sizes else CUSTOM


def _unstack(leaf):
    return (jax.tree.map(lambda x: x[i], leaf) for i in range(len(jax.tree.leaves(leaf)[0])))  # noqa: B023


def _leaf_to_torch(leaf, layout, patch_size):
    if layout in _ARRAYS:
        return {"": _ARRAYS[layout][0](leaf)}
    if layout == "norm":
        return {".weight": leaf["scale"], ".bias": leaf["bias"]}
    if layout == "distances":
        return {"": jnp.concatenate([leaf["table"], leaf["unused"]])}
    kernel = leaf["kernel"]
    if layout == "patch map":  # [(p q c), D] → [D, c, p, q]
        weight = kernel.reshape(patch_size, patch_size, -1, kernel.shape[-1]).transpose(3, 2, 0, 1)
    else:
        weight = kernel.T
    return {".weight": weight, ".bias": leaf["bias"]}


def _leaf_from_torch(rest, key, layout, patch_size):
    if layout in _ARRAYS:
        return _ARRAYS[layout][1](rest.pop(key))
    if layout == "distances":
        table = rest.pop(key)
        return {"table": table[:-UNUSED_ROWS], "unused": table[-UNUSED_ROWS:]}
    weight = rest.pop(f"{key}.weight")
    if layout == "norm":
        return {"scale": weight, "bias": rest.pop(f"{key}.bias")}
    if layout == "patch map":
        kernel = weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])
    else:
        kernel = weight.T
    return {"kernel": kernel, "bias": rest.pop(f"{key}.bias")}
