"""The card beside exported weights: what they are and how to load them."""

from typing import Any

import numpy as np

WEIGHTS_IN_WORDS = {"ema": "EMA", "params": "raw weights", "both": '"model": raw, "ema": their EMA'}


def model_card(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    """Markdown for weights that `about` (the content of config.json) describes."""
    m, diffusion, data = (about["config"][section] for section in ("model", "diffusion", "data"))
    decoder = (
        f"{m['decoder_depth']} blocks of width {m['decoder_hidden_size']}, {m['decoder_num_heads']} heads, "
        f"{'with' if 'model.mask_token' in tensors else 'without'} mask token"
    )
    side, channels, classes = m["image_size"], m["channels"], m["num_classes"]
    rows = {
        "Architecture": about["model"],
        "Encoder": f"{m['depth']} blocks of width {m['hidden_size']}, {m['num_heads']} heads",
        "Decoder": decoder if m["use_decoder"] else "none",
        "Input": f"{data['space']} [{channels}, {side}, {side}], patches {m['patch_size']}×{m['patch_size']}",
        "Classes": f"{classes}, as one-hot vectors; no class is the zero vector"
        if classes
        else "unconditional",
        "Weights": WEIGHTS_IN_WORDS[about["weights"]],
        # Imported weights of unknown age are step 0.
        "Training step": f"{about['step']:,}" if about["step"] else "not known",
        "Preconditioning": f"EDM, sigma_data = {diffusion['sigma_data']:g}",
        "Latent scale": f"latents = {data['latent_scale']:g} · autoencoder output",
        "Tensors": f"{len(tensors)} of float32, {sum(x.size for x in tensors.values()):,} values",
    }
    if data["space"] == "pixels":
        del rows["Latent scale"]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    file = about["file"]
    if file.endswith(".pt"):
        torch_lines = f'weights = torch.load("{file}", weights_only=True)["ema"]'
    else:
        torch_lines = f'weights = safetensors.torch.load_file("{file}")'
    return f"""# {about["model"]}

Weights of a diffusion transformer trained on masked tokens ([MaskDiT](https://arxiv.org/abs/2306.09305)),
exported by maskdit_jax.
`config.json` holds the configuration they were trained with.

| | |
|---|---|
{table}

In PyTorch, where `network` is the preconditioned network of the architecture above:

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
