"""MaskDM on scikit-learn's handwritten digits: masked pre-training of a small U-ViT in pixels, on a CPU.

Then configs/digits_maskdm_finetune.py. Hardware: 2 CPU cores. Results: docs/RESULTS.md.
"""

from configs import base


def get_config():
    config = base.get_config("maskdm")
    config.data.update(
        source="digits", space="pixels", image_size=8, channels=1, num_classes=10, num_threads=1
    )
    config.method.network.update(size="custom", hidden_size=96, depth=5, num_heads=4, patch_size=2)
    config.method.update(mask_type="block", mask_ratio=0.5, block_size=2)
    config.compute.update(precision="float32", unroll="full")
    config.training.update(num_steps=1_500, batch_size=128)
    config.ema.update(decay=0.995, rule="warmup")
    config.optimizer.update(
        learning_rate=2e-3, b1=0.99, b2=0.99, weight_decay=0.03, clip_norm=1.0, warmup_kimg=25.6
    )
    config.checkpoint.every_steps = 500
    config.report.preview_steps = 0
    config.sampling.num_steps = 50
    config.evaluation.num_samples = 1_437
    return config
