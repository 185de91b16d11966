"""Downsampled ImageNet: 32×32, colour."""

from types import MappingProxyType

from nvae_lightning.data.base import ImageDataModule
from nvae_lightning.utilities.image import Image


class ImageNet32(ImageDataModule):
    """ImageNet 32×32 as in PixelRNN: 1,281,147 training and 50,000 test images.

    This is the older of two downsampled ImageNets; results on the newer, anti-aliased one differ
    by about 0.26 bits per dim. See `ImageDataModule` for the arguments.
    """

    citation = "van den Oord et al., Pixel Recurrent Neural Networks, ICML 2016"
    default_root = "data/imagenet32"
    default_image = Image(channels=3, size=32, bits=8)
    default_batch_size = 24
    default_flip = True
    counts = MappingProxyType({"train": 1_281_147, "test": 50_000})
    how_to_get = (
        "fetch the downsampled ImageNet from image-net.org/download-images or as described at "
        "github.com/openai/glow and prepare your copy (Glow's imagenet-oord-tfr.tar, "
        "train_32x32.zip with valid_32x32.zip, LMDB or parquet) with python -m "
        "nvae_lightning.prepare dataset=imagenet32 source=PATH"
    )
