"""As celebahq256_pretrain, with half of the patches visible.

Published: 200k steps of 64, learning rate 2e-4 after 5,000 steps of warm-up. Not run here.
"""

from configs import celebahq256_pretrain


def get_config():
    config = celebahq256_pretrain.get_config()
    config.method.mask_ratio = 0.5
    config.training.batch_size = 64
    config.optimizer.warmup_kimg = 5_000 * 64 / 1000
    return config
