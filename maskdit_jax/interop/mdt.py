"""MDT and MDTv2: the names of their tensors in the authors' files."""

import functools
from typing import Any

import numpy as np

from maskdit_jax.interop import tables
from maskdit_jax.interop.dit import LABELS, PATCH_MAP, POSITIONS, PUBLISHED_DATA, TORCH_NETWORK
from maskdit_jax.interop.dit import TABLE as DIT_TABLE
from maskdit_jax.interop.maskdit import BLOCK as DIT_BLOCK
from maskdit_jax.interop.tables import Shapes, dimensions, named_size, read_depth, read_patches
from maskdit_jax.log import counted
from maskdit_jax.models.mdt import PATCH_SIZES, SIZES, published_decoder_depth
from maskdit_jax.models.sizes import size_name

__all__ = ["PATCH_MAP", "PUBLISHED_DATA", "TORCH_NETWORK"]
FAMILY, PAPER = "MDT", "https://arxiv.org/abs/2303.14389"
UNTOLD = ("decoder_depth",)  # of version 1, whose blocks are numbered through
DECODER_POSITIONS = "decoder_pos_embed"
BLOCK = [
    *DIT_BLOCK,
    ("positions", "attn.rel_pos_bias.relative_position_bias_table", "distances"),
    ("skip", "skip_linear", "linear"),
]
INDEX = "attn.rel_pos_bias.relative_position_index"
# Our stack of blocks, and its prefix there; version 1 numbers encoder and decoder through.
STACKS = {"in_blocks": "en_inblocks", "out_blocks": "en_outblocks", "decoder": "de_blocks"}
STACKS |= {"side.block": "sideblocks"}
IN_VERSION_1 = "blocks"
TABLE = [
    *(row for row in DIT_TABLE if not row[0].startswith("encoder.")),
    ("positions.table", POSITIONS, "row"),
    ("side.positions.table", DECODER_POSITIONS, "row"),
    ("side.mask_token", "mask_token", "token"),
    *(
        (f"{stack}.layers.{a}", f"{prefix}.{{i}}.{b}", c)
        for stack, prefix in STACKS.items()
        for a, b, c in BLOCK
    ),
]


def recognises(shapes: Shapes) -> bool:
    """Whether tensors of these shapes are meant to be an MDT: a DiT's names, and a side-interpolater's."""
    return any(key == DECODER_POSITIONS or key.startswith("sideblocks.") for key in shapes)


def read_options(shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Options of the network and its data, of version 1 all but how many blocks the decoder has."""
    hidden_size, channels, patch_size, grid = read_patches(shapes, PATCH_MAP, POSITIONS)
    version = 2 if any(key.startswith("en_inblocks.") for key in shapes) else 1
    if version == 2:
        decoder_depth = read_depth(shapes, "de_blocks.")
        depth = 2 * read_depth(shapes, "en_inblocks.") + decoder_depth
    else:
        depth, decoder_depth = read_depth(shapes, "blocks."), published_decoder_depth(1, hidden_size)
    # Of N² values: compared before any is computed, since N is of a table that a small file can have.
    if dimensions(shapes, f"sideblocks.0.{INDEX}", 2) != (grid**2, grid**2):
        raise ValueError(f"sideblocks.0.{INDEX} is not that of {grid}×{grid} patches")
    network: dict[str, Any] = {
        "version": version,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": dimensions(shapes, "sideblocks.0.attn.rel_pos_bias.relative_position_bias_table", 2)[1],
        "patch_size": patch_size,
        "decoder_depth": decoder_depth,
    }
    network["size"] = named_size(network, SIZES, PATCH_SIZES)
    # The last row is no class.
    num_classes = dimensions(shapes, LABELS, 2)[0] - 1 if LABELS in shapes else 0
    data = {"image_size": grid * patch_size, "channels": channels, "num_classes": num_classes}
    return {"network": network, "data": data}


def heads(network: Any) -> dict[str, tuple[int, int]]:
    """Those that the tables of distances tell; see `Layout`."""
    return {"num_heads": (network.num_heads, network.hidden_size)}


def method_options(network: Any) -> dict[str, Any]:
    """The mask ratios and the weight of MDTv2's published training."""
    return {"mask_ratio_spread": 0.2, "min_snr": 5.0} if network.version == 2 else {}


def to_torch(params: dict[str, Any], network: Any, data: Any) -> dict[str, Any]:
    """Torch tensors of our parameters, the index tables included; keys as in the authors' files."""
    learned = tables.to_torch(params, TABLE, network.patch_size)
    return fixed_tensors(network, data) | {_published(key, network): x for key, x in learned.items()}


def from_torch(tensors: dict[str, Any], network: Any) -> dict[str, Any]:
    """Our parameters from torch tensors; the index tables are none and are left out."""
    learned = {_ours(key, network): x for key, x in tensors.items() if not key.endswith(INDEX)}
    return tables.from_torch(learned, TABLE, network.patch_size)


def _published(key: str, network: Any) -> str:
    """The name of a tensor in version 1, whose decoder's blocks are the last of all blocks."""
    stack, _, rest = key.partition(".")
    if network.version == 2 or stack not in ("en_inblocks", "de_blocks"):
        return key
    number, _, rest = rest.partition(".")
    first = network.depth - network.decoder_depth if stack == "de_blocks" else 0
    return f"{IN_VERSION_1}.{first + int(number)}.{rest}"


def _ours(key: str, network: Any) -> str:
    """Inverse of `_published`."""
    stack, _, rest = key.partition(".")
    if network.version == 2 or stack != IN_VERSION_1:
        return key
    number, _, rest = rest.partition(".")
    beyond = int(number) - (network.depth - network.decoder_depth)
    return f"en_inblocks.{number}.{rest}" if beyond < 0 else f"de_blocks.{beyond}.{rest}"


def fixed_tensors(network: Any, data: Any) -> dict[str, Any]:
    """The index of every block's table of distances, int64."""
    index = distance_index(data.image_size // network.patch_size)
    encoder = network.depth - network.decoder_depth
    half = encoder // 2 if network.version == 2 else 0
    counts = {"en_inblocks": encoder - half, "en_outblocks": half}
    counts |= {"de_blocks": network.decoder_depth, "sideblocks": 1}
    names = (f"{stack}.{i}.{INDEX}" for stack, count in counts.items() for i in range(count))
    return {_published(name, network): index for name in names}


@functools.lru_cache
def distance_index(grid: int) -> np.ndarray:
    """Row of a table of distances [N, N] int64, for each query and key of a grid's tokens."""
    rows, columns = np.divmod(np.arange(grid**2), grid)
    row, column = (x[:, None] - x[None] + grid - 1 for x in (rows, columns))
    index = row * (2 * grid - 1) + column
    index.flags.writeable = False
    return index


def model_name(network: Any) -> str:
    """Such as "MDT-XL/2" or "MDTv2-XL/2"; for other sizes the numbers in words."""
    family = FAMILY if network.version == 1 else f"{FAMILY}v2"
    size = size_name(network, SIZES)
    if size is not None:
        return f"{family}-{size}"
    return f"{family} of {counted(network.depth, 'block')} of width {network.hidden_size}"


def traits(network: Any) -> list[str]:
    """How many of the blocks are the decoder's."""
    return [f"{counted(network.decoder_depth, 'block')} of them in the decoder"]


def describe(method: Any, data: Any) -> dict[str, str]:
    """Rows of the model card: blocks, positions, how classes enter, what is predicted."""
    n, classes = method.network, data.num_classes
    encoder = counted(n.depth - n.decoder_depth, "block")
    skips = ", half of them with long skips" if n.version == 2 else ""
    return {
        "Encoder": f"{encoder} of width {n.hidden_size}, {n.num_heads} heads{skips}",
        "Side-interpolater": "one block, where tokens are hidden",
        "Decoder": counted(n.decoder_depth, "block") + (", each with the input" if skips else ""),
        "Positions": "learned, and in every attention a learned bias for each distance",
        "Classes": f"{classes}; no class is label {classes}" if classes else "unconditional",
        "Prediction": "the noise and, behind it, the variance; DDPM of "
        f"{len(method.noise_levels()):,} timesteps, linear schedule",
    }
