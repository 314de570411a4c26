"""MaskDM-B on LSUN Church 256×256, from scratch on whole images (MaskDM's own baseline).

Data: a folder of the images. Published: batch 64, linear schedule, EMA 0.9999. Not run here.
"""

from configs import celebahq256_pretrain


def get_config():
    config = celebahq256_pretrain.get_config()
    config.data.update(source="folder:data/church256", flip=True)
    config.method.update(noise_schedule="linear", mask_type="none")
    config.training.update(num_steps=2_000_000, batch_size=64)
    config.ema.decay = 0.9999
    config.optimizer.update(learning_rate=1e-4, warmup_kimg=5_000 * 64 / 1000)
    return config
