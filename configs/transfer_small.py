"""MaskDM-S, fine-tuned on a folder of 3,000 images (MaskDM, sec. 4.3: 10 % of CelebA-HQ).

Start from the pre-trained run's raw weights: --config.init_from=runs/transfer_small_pretrain
Published: batch 64, flips, no clipping; FID 46 % better than from scratch. The number of steps is not
stated. Not run here.
"""

from configs import transfer_small_pretrain


def get_config():
    config = transfer_small_pretrain.get_config()
    config.data.update(source="folder:data/celebahq256_3000", flip=True)
    config.init_weights = "params"
    config.method.mask_type = "none"
    config.training.batch_size = 64
    config.optimizer.update(learning_rate=5e-5, clip_norm=0.0)
    return config
