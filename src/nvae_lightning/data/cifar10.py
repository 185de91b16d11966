"""CIFAR-10: photographs of ten classes, 32×32, colour."""

from pathlib import Path

from torchvision import datasets

from nvae_lightning.data.download import DownloadedDataModule
from nvae_lightning.data.readers import torchvision_files
from nvae_lightning.utilities.image import Image


class CIFAR10(DownloadedDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images.

    If `root` holds nothing else, torchvision downloads the missing files of
    ``root/cifar-10-batches-py``. See `ImageDataModule` for the arguments.
    """

    citation = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"
    default_root = "data/cifar10"
    default_image = Image(channels=3, size=32, bits=8)
    default_batch_size = 32
    default_flip = True
    title = "CIFAR-10"
    place = torchvision_files.CIFAR10
    files = (
        "the files of cifar-10-python.tar.gz (data_batch_1 and so on), published at "
        "www.cs.toronto.edu/~kriz/cifar.html,"
    )

    def fetch(self, root: Path) -> None:
        """Download missing files, and compare all checksums."""
        datasets.CIFAR10(root, download=True)
