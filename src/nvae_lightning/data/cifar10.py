"""CIFAR-10: photographs of ten kinds of things, 32×32, colour."""

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision import datasets

from nvae_lightning.data.datamodule import ImageDataModule
from nvae_lightning.data.download import explain_missing


class CIFAR10(ImageDataModule):
    """CIFAR-10 as torchvision reads it: 50,000 training and 10,000 test images.

    Takes the arguments of `ImageDataModule`. If ``root/cifar-10-batches-py`` holds the data, they
    are only read; otherwise they are downloaded there.
    """

    def prepare_data(self) -> None:
        """Download the files unless they are there.

        Raises:
            ValueError: If that fails, for example without a network.
        """
        self._open(train=False, download=True)

    def load(self, train: bool) -> UInt8[Tensor, "count channel height width"]:
        """Return all images of a split.

        Raises:
            ValueError: If the files are missing or damaged.
        """
        return torch.from_numpy(self._open(train, download=False).data.transpose(0, 3, 1, 2))

    def _open(self, train: bool, download: bool) -> datasets.CIFAR10:
        files = "the files of cifar-10-python.tar.gz (data_batch_1 and so on)"
        folder = self.folder / "cifar-10-batches-py"
        with explain_missing("CIFAR-10", files, folder, self.download_hint):
            return datasets.CIFAR10(self.folder, train=train, download=download)
