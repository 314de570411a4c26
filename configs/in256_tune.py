"""Unmasked tuning of in256 at a constant mask ratio of 0: the best weights for sampling with guidance.

Data: as for in256. Start from the masked run: --config.init_from=runs/in256
Published: 8 A100-80GB, up to 75k–100k steps; FID-50k 2.28 with guidance 1.5. Not run here.
"""

from configs import in256


def get_config():
    config = in256.get_config()
    config.compute.precision = "tf32"
    config.method.mask_ratio = 0.0
    config.training.num_steps = 75_000
    config.optimizer.learning_rate = 5e-5
    return config
