"""MaskDM-B on CelebA-HQ 256×256, fine-tuned on whole images (MaskDM, table 1).

Start from the pre-trained run's raw weights: --config.init_from=runs/celebahq256_pretrain
Published: batch 32, learning rate 1e-5 after 5,000 steps of warm-up, FID 6.27 (the paper's third version);
the number of steps is not stated for this model, 550,000 for an older one. Not run here.
"""

from configs import celebahq256_pretrain


def get_config():
    config = celebahq256_pretrain.get_config()
    config.init_weights = "params"
    config.method.mask_type = "none"
    config.training.update(num_steps=550_000, batch_size=32)
    config.optimizer.update(learning_rate=1e-5, warmup_kimg=5_000 * 32 / 1000)
    return config
