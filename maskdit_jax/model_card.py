"""The card beside exported weights: what they are and how to load them."""

from collections import Counter
from typing import Any

import numpy as np

from maskdit_jax.interop import Layout
from maskdit_jax.sampling import Model

WEIGHTS_IN_WORDS = {"ema": "EMA", "params": "raw weights", "both": '"model": raw, "ema": their EMA'}


def model_card(about: dict[str, Any], tensors: dict[str, np.ndarray], model: Model, layout: Layout) -> str:
    """Markdown for the weights of a model that `about` (the content of config.json) describes."""
    side, channels, _ = model.shape
    data, patch = model.config.data, model.method.network.patch_size
    types = Counter(str(x.dtype) for x in tensors.values())
    of_types = ", ".join(f"{number} of {name}" for name, number in types.items())
    rows = {
        "Architecture": about["model"],
        "Input": f"{data.space} [{channels}, {side}, {side}], patches {patch}×{patch}",
        **layout.describe(model.method, model.shape),
        "Weights": WEIGHTS_IN_WORDS[about["weights"]],
        # Imported weights of unknown age are step 0.
        "Training step": f"{about['step']:,}" if about["step"] else "not known",
        "Latent scale": f"latents = {data.latent_scale:g} · autoencoder output",
        "Tensors": f"{of_types}, {sum(x.size for x in tensors.values()):,} values",
    }
    if data.space == "pixels":
        del rows["Latent scale"]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    file = about["file"]
    if file.endswith(".pt"):
        torch_lines = f'weights = torch.load("{file}", weights_only=True)["ema"]'
    else:
        torch_lines = f'weights = safetensors.torch.load_file("{file}")'
    return f"""# {about["model"]}

Weights of a diffusion transformer trained on masked tokens ([{layout.FAMILY}]({layout.PAPER})),
exported by maskdit_jax.
`config.json` holds the configuration they were trained with.

| | |
|---|---|
{table}

In PyTorch, where `network` is {layout.TORCH_NETWORK}:

```python
{torch_lines}
network.load_state_dict(weights, strict=True)
```

In maskdit_jax:

```python
maskdit_jax.import_torch("{file}", "runs/imported")
model = maskdit_jax.load("runs/imported")
images = model.sample(seeds=[0, 1, 2, 3])
```
"""
