"""MaskDM-S on CelebA 64×64: the ablation of masks (MaskDM, table 4); block 4×4 at 50 % as it stands here.

Random patches: --config.method.mask_type=patch --config.method.mask_ratio=0.1, 0.5 or 0.9
Blocks: --config.method.block_size=2, 4 (at 0.1, 0.5 or 0.9) or 8 (at 0.5)
One window: --config.method.mask_type=crop --config.method.crop_size=15, 11 or 5
Data: a folder of the images, cropped and resized as wished. Then configs/celeba64_finetune.py.
Published: 200k steps of 256. Not run here.
"""

from configs import celebahq256_pretrain


def get_config():
    config = celebahq256_pretrain.get_config()
    config.data.update(source="folder:data/celeba64", image_size=64)
    config.method.network.size = "S/4"
    config.method.update(noise_schedule="linear", mask_ratio=0.5)
    config.optimizer.clip_norm = 0.0
    return config
