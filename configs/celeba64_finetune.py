"""MaskDM-S on CelebA 64×64, fine-tuned on whole images after any of the masks of celeba64_pretrain.

Start from the pre-trained run's raw weights: --config.init_from=runs/celeba64_pretrain
Published: batch 128; the number of steps is not stated. Not run here.
"""

from configs import celeba64_pretrain


def get_config():
    config = celeba64_pretrain.get_config()
    config.init_weights = "params"
    config.method.mask_type = "none"
    config.training.batch_size = 128
    return config
