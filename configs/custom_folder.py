"""MaskDiT-B/2 on a folder of one's own images: the template for other data. Copy it and change the numbers.

Data: one sub-folder for each class, or images alone (then num_classes = 0); jpeg, png or webp.
python tools/encode_latents.py --source=folder:images --vae=sd-vae-ft-ema --out=data/custom --resolution=256
stats.json in data/custom tells the number of images of each class and the scale of the latents.
Not run here.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.data.source = "latents:data/custom"
    config.data.num_threads = 1
    config.vae = "sd-vae-ft-ema"  # previews and samples as pixels
    config.data.image_size = 32  # resolution / 8
    config.data.num_classes = 10  # sub-folders; 0: none
    config.method.network.size = "B/2"
    config.training.update(num_steps=200_000, batch_size=256)
    config.checkpoint.every_steps = 2_000
    config.report.preview_steps = 5_000
    return config
