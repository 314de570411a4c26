"""MaskDM-S, masked pre-training on one set of faces for another, small one (MaskDM, sec. 4.3).

Data: a folder of the larger set, at 256×256; in the paper VGGFace2 or CelebA-HQ. Then transfer_small.py.
Published: 200k steps of 256, 90 % hidden in blocks of 4×4 patches. Not run here.
"""

from configs import celebahq256_pretrain


def get_config():
    config = celebahq256_pretrain.get_config()
    config.data.source = "folder:data/vggface2"
    config.method.network.size = "S/4"
    return config
