"""MaskDiT-XL/2 on ImageNet 512×512, masked training (MaskDiT, table 2; tuning: in512_tune.py).

Data: ILSVRC2012_img_train.tar and _val.tar in TFDS_DATA_DIR/downloads/manual, then
python tools/encode_latents.py --source=tfds:imagenet2012 --vae=DIR --resolution=512 --out=data/in512
or the authors' latents: python tools/import_latents.py --format=webdataset --input=PATH --out=data/in512
Published: 1M steps of 1024; 209 A100-days in all, the tuning included. FID-50k after tuning: 10.79
without guidance, 2.50 with. Not run here.
"""

from configs import in256


def get_config():
    config = in256.get_config()
    config.data.image_size = 64
    config.data.source = "latents:data/in512"
    config.training.num_steps = 1_000_000
    return config
