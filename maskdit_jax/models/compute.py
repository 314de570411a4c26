"""How a network is computed, which does not change what it computes: options that all networks share."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from maskdit_jax.options import option

# Compute dtype and the precision of its matrix products; parameters are always float32.
PRECISIONS = {
    "bfloat16": (jnp.bfloat16, "default"),
    "tf32": (jnp.float32, "tensorfloat32"),
    "float32": (jnp.float32, "highest"),
}
REMAT_POLICIES = ("none", "mlp", "full")
UNROLL_CHOICES = ("auto", "full", "none")
ATTENTION_CHOICES = ("auto", "cudnn", "products")


@dataclass(frozen=True)
class Compute:
    """Options of every network's computation."""

    precision: str = option(
        "bfloat16", "of compute: bfloat16, tf32 or float32; parameters are float32", choices=tuple(PRECISIONS)
    )
    remat: str = option(
        "none", "recompute in the backward pass: none, mlp (fc1 and GELU) or full", choices=REMAT_POLICIES
    )
    unroll: str = option(
        "auto", "unroll the loop over blocks: full, none or auto (full on a GPU)", choices=UNROLL_CHOICES
    )
    attention: str = option(
        "auto",
        "cudnn (its fused kernel, for 16-bit heads that it knows), products or auto (cudnn on a GPU)",
        choices=ATTENTION_CHOICES,
    )

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations."""
        return PRECISIONS[self.precision][0]

    @property
    def matmul_precision(self) -> str:
        """Of matrix products, as `jax.default_matmul_precision` takes it."""
        return PRECISIONS[self.precision][1]


def chosen(choice: str, on_gpu: str) -> bool:
    """Whether an option is `on_gpu`, the value that "auto" stands for where JAX's backend is a GPU."""
    return choice == on_gpu or (choice == "auto" and jax.default_backend() == "gpu")
