"""MaskDiT, and its plain DiT: the names of their tensors in the authors' files."""

from typing import Any

from maskdit_jax.interop import tables
from maskdit_jax.interop.tables import (
    Shapes,
    dimensions,
    named_size,
    published_heads,
    read_depth,
    read_patches,
    same_width,
)
from maskdit_jax.log import counted
from maskdit_jax.models.embed import position_table
from maskdit_jax.models.maskdit import PATCH_SIZES, SIZES
from maskdit_jax.models.sizes import size_name

FAMILY, PAPER = "MaskDiT", "https://arxiv.org/abs/2306.09305"
PATCH_MAP = "model.x_embedder.proj.weight"
TORCH_NETWORK = "the preconditioned network of the architecture above"
PUBLISHED_DATA = {"space": "latents", "latent_scale": 0.18215}
UNTOLD = ()
PUBLISHED_DECODER = (512, 16)  # width and heads, at every size
BLOCK = [
    ("modulation.linear", "adaLN_modulation.1", "linear"),
    ("attention.qkv", "attn.qkv", "linear"),
    ("attention.projection", "attn.proj", "linear"),
    ("mlp.fc1", "mlp.fc1", "linear"),
    ("mlp.fc2", "mlp.fc2", "linear"),
]
MODULATED_LINEAR = [
    ("modulation.linear", "adaLN_modulation.1", "linear"),
    ("linear", "linear", "linear"),
]
TABLE = [
    ("mask_token", "model.mask_token", "token"),
    ("patch_embedding", "model.x_embedder.proj", "patch map"),
    ("noise_embedding.fc1", "model.t_embedder.mlp.0", "linear"),
    ("noise_embedding.fc2", "model.t_embedder.mlp.2", "linear"),
    ("label_embedding.table", "model.y_embedder.embedding_table.weight", "transposed"),
    *((f"encoder.layers.{a}", f"model.blocks.{{i}}.{b}", c) for a, b, c in BLOCK),
    *((f"bridge.{a}", f"model.decoder_layer.{b}", c) for a, b, c in MODULATED_LINEAR),
    *((f"decoder.layers.{a}", f"model.decoder_blocks.{{i}}.{b}", c) for a, b, c in BLOCK),
    *((f"output.{a}", f"model.final_layer.{b}", c) for a, b, c in MODULATED_LINEAR),
]


def recognises(shapes: Shapes) -> bool:
    """Whether tensors of these shapes are meant to be a MaskDiT."""
    return any(key.startswith("model.") for key in shapes)


def read_options(shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Options of the network and its data, all but its numbers of heads; see `Layout`."""
    hidden_size, channels, patch_size, grid = read_patches(shapes, PATCH_MAP, "model.pos_embed")
    label_table = "model.y_embedder.embedding_table.weight"
    network: dict[str, Any] = {
        "hidden_size": hidden_size,
        "depth": read_depth(shapes, "model.blocks."),
        "patch_size": patch_size,
        "use_decoder": any(key.startswith("model.decoder_") for key in shapes),
        "mask_token": "model.mask_token" in shapes,
    }
    if network["use_decoder"]:
        network["decoder_hidden_size"] = width = dimensions(shapes, "model.decoder_layer.linear.weight", 2)[0]
        network["decoder_depth"] = read_depth(shapes, "model.decoder_blocks.")
        same_width("model.decoder_pos_embed", dimensions(shapes, "model.decoder_pos_embed", 3)[2], width)
    network["size"] = named_size(network, SIZES, PATCH_SIZES)
    num_classes = dimensions(shapes, label_table, 2)[1] if label_table in shapes else 0
    data = {"image_size": grid * patch_size, "channels": channels, "num_classes": num_classes}
    return {"network": network, "data": data}


def heads(network: Any) -> dict[str, tuple[int, int]]:
    """Heads of the published encoders and decoder; see `Layout`."""
    width, decoder_heads = PUBLISHED_DECODER
    return {
        **published_heads(network, SIZES),
        "decoder_num_heads": (
            decoder_heads if network.decoder_hidden_size == width else 0,
            network.decoder_hidden_size,
        ),
    }


def method_options(network: Any) -> dict[str, Any]:
    """Where there is no mask token there was no reconstruction of what is hidden."""
    return {} if network.mask_token else {"mae_coef": 0.0}


def to_torch(params: dict[str, Any], network: Any, data: Any) -> dict[str, Any]:
    """Torch tensors of our parameters, the fixed position tables included; keys as in the authors' file."""
    return fixed_tensors(network, data) | tables.to_torch(params, TABLE, network.patch_size)


def from_torch(tensors: dict[str, Any], network: Any) -> dict[str, Any]:
    """Our parameters from torch tensors; the position tables in them are not parameters and are left out."""
    fixed = ("model.pos_embed", "model.decoder_pos_embed")
    learned = {key: value for key, value in tensors.items() if key not in fixed}
    return tables.from_torch(learned, TABLE, network.patch_size)


def fixed_tensors(network: Any, data: Any) -> dict[str, Any]:
    """The position tables."""
    grid = data.image_size // network.patch_size
    fixed = {"model.pos_embed": position_table(network.hidden_size, grid)[None]}
    if network.use_decoder:
        fixed["model.decoder_pos_embed"] = position_table(network.decoder_hidden_size, grid)[None]
    return fixed


def model_name(network: Any) -> str:
    """Such as "MaskDiT-XL/2", or "DiT-XL/2" without decoder; for other sizes the numbers in words."""
    family = FAMILY if network.use_decoder else "DiT"
    size = size_name(network, SIZES)
    if size is not None:
        return f"{family}-{size}"
    return f"{family} of {counted(network.depth, 'block')} of width {network.hidden_size}"


def traits(network: Any) -> list[str]:
    """Whether it has a mask token."""
    return [f"{'with' if network.mask_token else 'without'} mask token"]


def describe(method: Any, data: Any) -> dict[str, str]:
    """Rows of the model card: encoder, decoder, classes, preconditioning."""
    n, classes = method.network, data.num_classes
    decoder = (
        f"{counted(n.decoder_depth, 'block')} of width {n.decoder_hidden_size}, {n.decoder_num_heads} heads, "
        f"{traits(n)[0]}"
    )
    return {
        "Encoder": f"{counted(n.depth, 'block')} of width {n.hidden_size}, {n.num_heads} heads",
        "Decoder": decoder if n.use_decoder else "none",
        "Classes": f"{classes}, as one-hot vectors; no class is the zero vector"
        if classes
        else "unconditional",
        "Preconditioning": f"EDM, sigma_data = {method.sigma_data:g}",
    }
