"""MaskDM-S on CelebA 64×64: the ablation of masks (MaskDM, table 4); block 4×4 at 50 % as it stands here.

Random patches: --config.method.mask_type=patch --config.method.mask_ratio=0.1, 0.5 or 0.9
Blocks: --config.method.block_size=2, 4 (at 0.1, 0.5 or 0.9) or 8 (at 0.5)
One window: --config.method.mask_type=crop --config.method.crop_size=15, 11 or 5
Data: a folder of the images, cropped and resized as wished. Then configs/celeba64_finetune.py.
Published: 200k steps of 256. Not run here.
"""

from configs import base


def get_config():
    config = base.get_config("maskdm")
    config.data.update(
        source="folder:data/celeba64", space="pixels", image_size=64, channels=3, num_classes=0
    )
    config.data.num_threads = 8
    config.method.network.size = "S/4"
    config.method.update(noise_schedule="linear", mask_type="block", mask_ratio=0.5, block_size=4)
    config.training.update(num_steps=200_000, batch_size=256)
    config.ema.update(decay=0.999, rule="warmup")
    config.optimizer.update(learning_rate=2e-4, b1=0.99, b2=0.99, weight_decay=0.03)
    config.checkpoint.every_steps = 10_000
    config.report.preview_steps = 10_000
    return config
