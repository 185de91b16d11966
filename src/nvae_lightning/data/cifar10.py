"""CIFAR-10: photographs of ten classes, 32×32, colour."""

from torchvision import datasets

from nvae_lightning.data.base import ImageDataModule
from nvae_lightning.data.checks import naming
from nvae_lightning.data.download import download, is_for_torchvision
from nvae_lightning.data.readers import torchvision_files
from nvae_lightning.utilities.image import Image


class CIFAR10(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images.

    If `root` holds nothing else, torchvision downloads what is missing of
    ``root/cifar-10-batches-py``. See `ImageDataModule` for the arguments.
    """

    citation = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"
    default_root = "data/cifar10"
    default_image = Image(channels=3, size=32, bits=8)
    default_batch_size = 32
    default_flip = True

    def prepare_data(self) -> None:
        """Download the files if they are missing.

        Raises:
            ValueError: If that fails, for example without a network.
        """
        place = self.folder / torchvision_files.CIFAR10
        with naming("dataset.root"):
            if is_for_torchvision(self.folder, place):
                torchvision_files.check_files(self.folder, torchvision_files.CIFAR10)
                files = (
                    "the files of cifar-10-python.tar.gz (data_batch_1 and so on), published at "
                    "www.cs.toronto.edu/~kriz/cifar.html,"
                )
                download(
                    "CIFAR-10", files, place, lambda: datasets.CIFAR10(self.folder, download=True)
                )
        super().prepare_data()
