"""Exchange of weights with PyTorch: files, and one module for each family of tensor names.

A family of networks that a method learns is a module here that has the method's name, such as maskdit.py,
and offers what `Layout` lists; `tables` has what they share.
"""

import importlib
import importlib.util
from typing import Any, Protocol

from maskdit_jax.interop.tables import Shapes


class Layout(Protocol):
    """What a family's module offers. `network` is the record of options of the method's network.

    FAMILY: its name, for messages. PAPER: its address. PATCH_MAP: a tensor that every such network has.
    TORCH_NETWORK: what in PyTorch has these names, for the model card. PUBLISHED_DATA: `space` and
    `latent_scale` of a file that does not say. UNTOLD: options of the network, besides heads, that tensors do
    not tell; a file that does not say has the published values.
    """

    FAMILY: str
    PAPER: str
    PATCH_MAP: str
    TORCH_NETWORK: str
    PUBLISHED_DATA: dict[str, Any]
    UNTOLD: tuple[str, ...]

    def recognises(self, shapes: Shapes) -> bool:
        """Whether tensors of these shapes are meant to be such a network."""

    def read_options(self, shapes: Shapes) -> dict[str, dict[str, Any]]:
        """Options of the network and its data ("network", "data") by name, all but what tensors do not tell.

        Only the tensors that decide are looked at: the caller compares the rest with what `to_torch`
        gives for the options.

        Raises:
          KeyError: a tensor that decides is missing.
          ValueError: one has a shape that no such network has.
        """

    def heads(self, network: Any) -> dict[str, tuple[int, int]]:
        """By option: the heads of the published networks, 0 where this is none of them; and their width."""

    def method_options(self, network: Any) -> dict[str, Any]:
        """Options of the method that a network of this kind was trained with, where not the defaults."""

    def to_torch(self, params: dict[str, Any], network: Any, data: Any) -> dict[str, Any]:
        """Tensors by their names in PyTorch, of parameters; `data` is the `Shape` of its data."""

    def from_torch(self, tensors: dict[str, Any], network: Any) -> dict[str, Any]:
        """Parameters of tensors.

        Raises:
          KeyError: a tensor is missing or unexpected.
        """

    def fixed_tensors(self, network: Any, data: Any) -> dict[str, Any]:
        """Those of the tensors that are no parameters, but always these values."""

    def model_name(self, network: Any) -> str:
        """Such as "MaskDiT-XL/2"; for other sizes the numbers in words."""

    def traits(self, network: Any) -> list[str]:
        """What that name does not say of the network."""

    def describe(self, method: Any, data: Any) -> dict[str, str]:
        """Rows of the model card, by name: how the network of a method is built and called."""


def layout_of(method_name: str) -> Layout | None:
    """The module with the tensor names of a method's network; None where there is none."""
    module = f"{__name__}.{method_name}"
    if not method_name.isidentifier() or importlib.util.find_spec(module) is None:
        return None
    return importlib.import_module(module)  # type: ignore[return-value]
