"""CIFAR-10: photographs of ten kinds of things, 32×32, colour."""

from torchvision import datasets

from nvae_lightning.data.checks import naming
from nvae_lightning.data.datamodule import ImageDataModule
from nvae_lightning.data.download import download, is_for_torchvision
from nvae_lightning.data.readers import torchvision_files


class CIFAR10(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images.

    Takes the arguments of `ImageDataModule`. Where `root` holds nothing else, torchvision
    downloads what is missing of ``root/cifar-10-batches-py``.
    """

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
                    "CIFAR-10", files, place, self.download_hint,
                    lambda: datasets.CIFAR10(self.folder, download=True),
                )  # fmt: skip
        super().prepare_data()
