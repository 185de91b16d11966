"""Images for training and testing: from any source to batches on the device.

A source (`sources`) is decoded into memory, or prepared once (`prepare`, `storage`) and memory
mapped. `ImageDataModule` gives batches (batch, channel, height, width) of float32 images in
[0, 1]; the settings of a dataset, not its class, say what is cropped, kept and held out.
"""

from nvae_lightning.data.all_images import AllImages
from nvae_lightning.data.cifar10 import CIFAR10
from nvae_lightning.data.datamodule import ImageDataModule
from nvae_lightning.data.mnist import MNIST, MNIST5k

__all__ = ["CIFAR10", "MNIST", "AllImages", "ImageDataModule", "MNIST5k"]
