"""MaskDiT-XL/2 on ImageNet 256×256, masked training (MaskDiT, table 1; tuning: in256_tune*.py).

Data: ILSVRC2012_img_train.tar and _val.tar in TFDS_DATA_DIR/downloads/manual, then
python tools/encode_latents.py --source=tfds:imagenet2012 --vae=DIR --resolution=256 --out=data/in256
or the authors' latents: python tools/import_latents.py --format=lmdb --input=PATH --out=data/in256
Published: 2M steps of 1024, 8 A100-80GB; 273 hours in all, the tuning included. FID-50k after tuning:
5.69 without guidance, 2.28 with. Not run here.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.data.source = "latents:data/in256"
    config.data.num_threads = 1
    return config
