"""Named sizes of networks: "XL/2" is a depth, a width, a number of heads and a patch size."""

from collections.abc import Collection, Mapping
from typing import Any

from maskdit_jax.errors import UserError

CUSTOM = "custom"
NUMBERS = ("depth", "hidden_size", "num_heads", "patch_size")
Sizes = Mapping[str, tuple[int, int, int]]  # (depth, hidden_size, num_heads)


def fill_size(network: Any, sizes: Sizes, patch_sizes: Collection[int]) -> None:
    """Fill in those of the four numbers of a frozen record that are 0, by its `size`; for __post_init__.

    Raises:
      UserError: the size is unknown.
    """
    if network.size == CUSTOM:
        return
    name, _, patch = network.size.partition("/")
    if name not in sizes or patch not in map(str, patch_sizes):
        *but_one, last = (f"/{p}" for p in patch_sizes)
        patches = f"{', '.join(but_one)} or {last}" if but_one else last
        raise UserError(
            f"method.network.size={network.size!r} is unknown; known: {', '.join(sizes)} followed by "
            f"{patches}, or {CUSTOM}"
        )
    for number, value in zip(NUMBERS, (*sizes[name], int(patch)), strict=True):
        object.__setattr__(network, number, getattr(network, number) or value)


def size_name(network: Any, sizes: Sizes) -> str | None:
    """Such as "XL/2", of a network's numbers; None where they are no named size."""
    for name, (depth, hidden_size, _) in sizes.items():
        if (depth, hidden_size) == (network.depth, network.hidden_size):
            return f"{name}/{network.patch_size}"
    return None
