"""Images for training and testing: one LightningDataModule per kind of source.

Each gives batches (batch, channel, height, width) of float32 images in [0, 1]. To add a source,
subclass `ImageDataModule` and implement `load`.
"""

from nvae_lightning.data.cifar10 import CIFAR10
from nvae_lightning.data.datamodule import ImageDataModule
from nvae_lightning.data.image_folder import ImageFolder
from nvae_lightning.data.mnist import MNIST, MNIST5k

__all__ = ["CIFAR10", "MNIST", "ImageDataModule", "ImageFolder", "MNIST5k"]
