"""MaskDM-B on CelebA-HQ 256×256, masked pre-training at 90 % in blocks of 4×4 patches (MaskDM, sec. 4).

Data: a folder of the 30,000 images. Then configs/celebahq256_finetune.py.
Published: 200k steps of 256. Not run here.
"""

from configs import base


def get_config():
    config = base.get_config("maskdm")
    config.data.update(
        source="folder:data/celebahq256", space="pixels", image_size=256, channels=3, num_classes=0
    )
    config.data.num_threads = 8
    config.method.network.size = "B/4"
    config.method.update(noise_schedule="cosine", mask_type="block", mask_ratio=0.9, block_size=4)
    config.training.update(num_steps=200_000, batch_size=256)
    config.ema.update(decay=0.999, rule="warmup")
    config.optimizer.update(learning_rate=2e-4, b1=0.99, b2=0.99, weight_decay=0.03, clip_norm=1.0)
    config.checkpoint.every_steps = 10_000
    config.report.preview_steps = 10_000
    return config
