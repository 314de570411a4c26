"""Tuning of in256 with a mask ratio falling from 0.5 as cos⁴: the best weights without guidance.

Data: as for in256. Start from the masked run: --config.init_from=runs/in256
Published: 8 A100-80GB, cos⁴ from 0.5 to 0, 37.5k steps; FID-50k 5.69 without guidance. Inferred from the
authors' configuration, which runs the schedule over 100k steps with a checkpoint every 12.5k: the published
weights are the third checkpoint, at a ratio still near 0.24. Not run here.
"""

from configs import in256_tune


def get_config():
    config = in256_tune.get_config()
    config.method.update(mask_ratio=0.5, mask_ratio_min=0.0, mask_schedule="cosine4")
    config.method.mask_schedule_steps = 100_000  # longer than the run
    config.training.num_steps = 37_500
    return config
