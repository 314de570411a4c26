"""MaskDiT on scikit-learn's handwritten digits: the whole system on a laptop CPU, in minutes.

Hardware: 2 CPU cores. Results: docs/RESULTS.md.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.data.update(
        source="digits", space="pixels", image_size=8, channels=1, num_classes=10, num_threads=1
    )
    config.method.sigma_data = 0.75  # the standard deviation of the pixels, which are -1 … 1
    config.method.network.update(
        size="custom",
        hidden_size=96,
        depth=4,
        num_heads=4,
        patch_size=2,
        decoder_hidden_size=48,
        decoder_depth=2,
        decoder_num_heads=4,
    )
    # So small a model compiles fast either way; unrolled it trains a fifth faster.
    config.compute.update(precision="float32", unroll="full")
    config.training.update(num_steps=4_000, batch_size=128)
    config.ema.decay = 0.995
    config.optimizer.update(learning_rate=2e-3, warmup_kimg=25.6)
    # Early steps serve autoguidance: sample --weak=… --weak_step=1000.
    config.checkpoint.update(every_steps=500, keep_every_steps=1_000)
    config.report.preview_steps = 1_500
    config.sampling.num_steps = 18
    config.evaluation.num_samples = 1_437
    return config
