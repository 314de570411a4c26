"""maskdit_jax: training diffusion transformers on masked tokens, in JAX."""

from maskdit_jax.api import Model, load
from maskdit_jax.data.autoencoder import Autoencoder, load_autoencoder
from maskdit_jax.errors import UserError
from maskdit_jax.interop.exchange import export_torch, import_torch

__version__ = "0.1.0"
__all__ = ["Autoencoder", "Model", "UserError", "export_torch", "import_torch", "load", "load_autoencoder"]
