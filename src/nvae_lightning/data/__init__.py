"""Datasets as LightningDataModules, from any source of images to batches on the device.

Batches are float32 images in [0, 1], (batch, channel, height, width). `Datasets` takes plain
``torch.utils.data.Dataset`` objects.

>>> from nvae_lightning.data import CelebAHQ
>>> CelebAHQ("data/celeba_hq", batch_size=4).image
Image(channels=3, size=256, bits=5, padding=0)
"""

from nvae_lightning.data.base import ImageDataModule
from nvae_lightning.data.celeba import CelebA64, CelebAHQ
from nvae_lightning.data.cifar10 import CIFAR10
from nvae_lightning.data.ffhq import FFHQ
from nvae_lightning.data.image_folder import AllImages, ImageFolder
from nvae_lightning.data.imagenet import ImageNet32
from nvae_lightning.data.map_style import Datasets
from nvae_lightning.data.mnist import MNIST, MNIST5k
from nvae_lightning.utilities.image import Image

__all__ = [
    "CIFAR10",
    "FFHQ",
    "MNIST",
    "AllImages",
    "CelebA64",
    "CelebAHQ",
    "Datasets",
    "Image",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet32",
    "MNIST5k",
]
