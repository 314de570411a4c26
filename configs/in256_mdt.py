"""MDT-XL/2 on ImageNet 256×256 (MDT, arXiv 2303.14389, sec. 4): the second baseline of MaskDiT's paper.

Data: as for in256. Published: AdamW 3e-4 constant, no weight decay, batch 256, 6.5M steps, EMA 0.9999; 30 %
of the patches are hidden in the second of each step's two passes; 250 ancestral steps, guidance 3.8 that
grows. FID-50k 6.23 without guidance, 1.79 with. Not run here.
"""

from configs import base


def get_config():
    config = base.get_config("mdt")
    config.data.update(source="latents:data/in256", num_threads=1)
    config.training.update(num_steps=6_500_000, batch_size=256)
    config.optimizer.learning_rate = 3e-4
    return config
