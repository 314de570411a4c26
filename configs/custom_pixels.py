"""MaskDM-S/4 in the pixels of a folder of one's own images: the template. Copy it and change the numbers.

Data: one sub-folder for each class, or images alone (then num_classes = 0); they are cut square and resized.
Masked pre-training as it stands; afterwards fine-tune on whole images, the same or a few others:
--config.method.mask_type=none --config.init_from=DIR --config.init_weights=params
--config.optimizer.learning_rate=5e-5
Not run here.
"""

from configs import base


def get_config():
    config = base.get_config("maskdm")
    config.data.update(source="folder:images", space="pixels", image_size=64, channels=3, flip=True)
    config.data.num_classes = 10  # sub-folders; 0: none
    config.method.network.size = "S/4"
    config.method.update(mask_type="block", mask_ratio=0.5, block_size=4)
    config.training.update(num_steps=100_000, batch_size=128)
    config.optimizer.update(learning_rate=2e-4, b1=0.99, b2=0.99, weight_decay=0.03, clip_norm=1.0)
    config.ema.update(rule="warmup", decay=0.999)
    config.checkpoint.every_steps = 2_000
    config.report.preview_steps = 5_000
    return config
