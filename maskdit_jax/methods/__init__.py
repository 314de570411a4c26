"""Methods, one file each, to be read from top to bottom; METHODS is the only list of them."""

from maskdit_jax.methods.dit import DiT
from maskdit_jax.methods.maskdit import MaskDiT
from maskdit_jax.methods.maskdm import MaskDM
from maskdit_jax.methods.mdt import MDT
from maskdit_jax.methods.method import Method

METHODS: dict[str, type[Method]] = {"maskdit": MaskDiT, "maskdm": MaskDM, "dit": DiT, "mdt": MDT}
