"""DiT: the names of its tensors in the published files."""

from typing import Any

from maskdit_jax.interop import tables
from maskdit_jax.interop.maskdit import BLOCK, MODULATED_LINEAR
from maskdit_jax.interop.tables import (
    Shapes,
    dimensions,
    named_size,
    published_heads,
    read_depth,
    read_patches,
)
from maskdit_jax.log import counted
from maskdit_jax.models.embed import position_table
from maskdit_jax.models.maskdit import PATCH_SIZES, SIZES
from maskdit_jax.models.sizes import size_name

FAMILY, PAPER = "DiT", "https://arxiv.org/abs/2212.09748"
PATCH_MAP = "x_embedder.proj.weight"
POSITIONS, LABELS = "pos_embed", "y_embedder.embedding_table.weight"
TORCH_NETWORK = "the network of the architecture above"
PUBLISHED_DATA = {"space": "latents", "latent_scale": 0.18215}
UNTOLD = ()
TABLE = [
    ("patch_embedding", "x_embedder.proj", "patch map"),
    ("noise_embedding.fc1", "t_embedder.mlp.0", "linear"),
    ("noise_embedding.fc2", "t_embedder.mlp.2", "linear"),
    ("label_embedding.table", LABELS, "array"),
    *((f"encoder.layers.{a}", f"blocks.{{i}}.{b}", c) for a, b, c in BLOCK),
    *((f"output.{a}", f"final_layer.{b}", c) for a, b, c in MODULATED_LINEAR),
]


def recognises(shapes: Shapes) -> bool:
    """Whether tensors of these shapes are meant to be a DiT: its names, and none of a decoder's."""
    return any(key.startswith("x_embedder.") for key in shapes) and "decoder_pos_embed" not in shapes


def read_options(shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Options of the network and its data, all but its number of heads; see `Layout`."""
    hidden_size, channels, patch_size, grid = read_patches(shapes, PATCH_MAP, POSITIONS)
    network: dict[str, Any] = {
        "hidden_size": hidden_size,
        "depth": read_depth(shapes, "blocks."),
        "patch_size": patch_size,
    }
    network["size"] = named_size(network, SIZES, PATCH_SIZES)
    # The last row is no class.
    num_classes = dimensions(shapes, LABELS, 2)[0] - 1 if LABELS in shapes else 0
    data = {"image_size": grid * patch_size, "channels": channels, "num_classes": num_classes}
    return {"network": network, "data": data}


def heads(network: Any) -> dict[str, tuple[int, int]]:
    """Heads of the published networks; see `Layout`."""
    return published_heads(network, SIZES)


def method_options(network: Any) -> dict[str, Any]:
    """Nothing but the defaults is known."""
    return {}


def to_torch(params: dict[str, Any], network: Any, data: Any) -> dict[str, Any]:
    """Torch tensors of our parameters, the fixed position table included; keys as in the published files."""
    return fixed_tensors(network, data) | tables.to_torch(params, TABLE, network.patch_size)


def from_torch(tensors: dict[str, Any], network: Any) -> dict[str, Any]:
    """Our parameters from torch tensors; the position table is none and is left out."""
    learned = {key: value for key, value in tensors.items() if key != POSITIONS}
    return tables.from_torch(learned, TABLE, network.patch_size)


def fixed_tensors(network: Any, data: Any) -> dict[str, Any]:
    """The position table."""
    return {POSITIONS: position_table(network.hidden_size, data.image_size // network.patch_size)[None]}


def model_name(network: Any) -> str:
    """Such as "DiT-XL/2"; for other sizes the numbers in words."""
    size = size_name(network, SIZES)
    if size is not None:
        return f"{FAMILY}-{size}"
    return f"{FAMILY} of {counted(network.depth, 'block')} of width {network.hidden_size}"


def traits(network: Any) -> list[str]:
    """What tells it from MaskDiT's own DiT."""
    return ["learned variance"]


def describe(method: Any, data: Any) -> dict[str, str]:
    """Rows of the model card: blocks, how time and classes enter, what is predicted."""
    n, classes = method.network, data.num_classes
    return {
        "Blocks": f"{counted(n.depth, 'block')} of width {n.hidden_size}, {n.num_heads} heads",
        "Classes": f"{classes}; no class is label {classes}" if classes else "unconditional",
        "Prediction": "the noise and, behind it, the variance; DDPM of "
        f"{len(method.noise_levels()):,} timesteps, linear schedule",
    }
