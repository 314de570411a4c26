"""MDTv2-XL/2 on ImageNet 256×256 (MDT, arXiv 2303.14389v2), as in256_mdt but for what is stated here.

Published: Adan, which is not built: here AdamW, with the published limit of the gradient's norm; FID-50k 1.58
with guidance. A step's mask ratio is drawn in 0.3 … 0.5, here in at most 16 values, each a compiled program.
Not run here.
"""

from configs import in256_mdt


def get_config():
    config = in256_mdt.get_config()
    config.method.network.version = 2
    config.method.update(mask_ratio_spread=0.2, min_snr=5.0)
    config.training.num_steps = 4_600_000
    config.optimizer.clip_norm = 1.0
    return config
