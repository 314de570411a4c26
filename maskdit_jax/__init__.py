"""maskdit_jax: training diffusion transformers on masked tokens, in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from maskdit_jax.errors import UserError

if TYPE_CHECKING:
    from maskdit_jax.api import Model, load
    from maskdit_jax.data.vae import Autoencoder, load_autoencoder
    from maskdit_jax.evaluation.sample_card import evaluate_samples
    from maskdit_jax.exchange import export_torch, import_torch
    from maskdit_jax.run import load_config, train
    from maskdit_jax.sample_files import write_samples

__version__ = "0.1.0"
__all__ = [
    "Autoencoder",
    "Model",
    "UserError",
    "evaluate_samples",
    "export_torch",
    "import_torch",
    "load",
    "load_autoencoder",
    "load_config",
    "train",
    "write_samples",
]

# Where each name lives. It is imported when it is first used: who wants the network alone, or a flag's
# help, does not wait for Orbax.
_HOMES = {
    "Autoencoder": "data.vae",
    "Model": "sampling",
    "evaluate_samples": "evaluation.sample_card",
    "export_torch": "exchange",
    "import_torch": "exchange",
    "load": "api",
    "load_autoencoder": "data.vae",
    "load_config": "run",
    "train": "run",
    "write_samples": "sample_files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
