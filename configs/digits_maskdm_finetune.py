"""MaskDM on the digits, fine-tuned on whole images after digits_maskdm_pretrain.

Start from the pre-trained run's raw weights: --config.init_from=runs/digits_maskdm_pretrain
Hardware: 2 CPU cores. Results: docs/RESULTS.md.
"""

from configs import digits_maskdm_pretrain


def get_config():
    config = digits_maskdm_pretrain.get_config()
    config.init_weights = "params"
    config.method.mask_type = "none"
    config.training.num_steps = 750
    config.optimizer.learning_rate = 5e-4
    return config
