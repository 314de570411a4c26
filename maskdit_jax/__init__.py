"""maskdit_jax: training diffusion transformers on masked tokens, in JAX."""

from maskdit_jax.api import Model, load
from maskdit_jax.errors import UserError

__version__ = "0.1.0"
__all__ = ["Model", "UserError", "load"]
