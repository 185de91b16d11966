"""Flickr-Faces-HQ: faces, 256×256, colour."""

from types import MappingProxyType

from nvae_lightning.data.base import ImageDataModule
from nvae_lightning.utilities.image import Image


class FFHQ(ImageDataModule):
    """FFHQ 256×256 with 5 bits: 63,000 training and 7,000 test images.

    The dataset has no official split: 10 % of the images are held out for testing. See
    `ImageDataModule` for the arguments.
    """

    citation = "Karras et al., A Style-Based Generator Architecture for GANs, CVPR 2019"
    default_root = "data/ffhq"
    default_image = Image(channels=3, size=256, bits=5)
    default_batch_size = 4
    default_flip = True
    counts = MappingProxyType({"train": 63_000, "test": 7_000})
    how_to_get = (
        "fetch FFHQ from github.com/NVlabs/ffhq-dataset and prepare your copy (a folder "
        "or zip of images, LMDB or parquet) with python -m nvae_lightning.prepare dataset=ffhq "
        "source=PATH"
    )
