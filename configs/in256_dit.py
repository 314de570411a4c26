"""DiT-XL/2 on ImageNet 256×256 (DiT, arXiv 2212.09748): the baseline that MaskDiT is measured against.

Data: as for in256. DiT mirrors half of its images; of cached latents those of MaskDiT's authors hold both.
Published: AdamW 1e-4 constant, no weight decay, batch 256, 7M steps, EMA 0.9999, labels dropped with 0.1;
250 ancestral steps, FID-50k 9.62 without guidance, 2.27 at 1.5. Not run here.
"""

from configs import base


def get_config():
    config = base.get_config("dit")
    config.data.update(source="latents:data/in256", num_threads=1)
    config.training.update(num_steps=7_000_000, batch_size=256)
    return config
