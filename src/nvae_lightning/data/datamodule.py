"""What all data sets share: splits held in memory, loaders, and the way to the model's input."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Container
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nvae_lightning.data.transforms import binarize, quantize, random_horizontal_flip

Batch = TypeVar("Batch")


class ImageDataset(Dataset[UInt8[Tensor, "channel height width"]]):
    """Images of one size in one uint8 tensor.

    Args:
        images: All images.
    """

    def __init__(self, images: UInt8[Tensor, "count channel height width"]) -> None:
        self.images = images

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> UInt8[Tensor, "channel height width"]:
        """Return one image."""
        return self.images[index]

    def __getitems__(self, indices: list[int]) -> UInt8[Tensor, "batch channel height width"]:
        """Return a batch by one index operation; `DataLoader` prefers this to `__getitem__`."""
        return self.images[indices]


class ImageDataModule(LightningDataModule, ABC):
    """A training and a test split of images, as batches of float32 images in [0, 1].

    A subclass says where the images come from by `load`. They stay uint8 in memory and through
    the loaders; flips and quantisation (or binarisation) follow on the device.

    Args:
        root: Folder that holds the data (``dataset.root``); None where no folder is read.
        batch_size: Images per batch and per device.
        image_size: Height and width of the images.
        channels: 1 (grey) or 3 (colour).
        bits: Bits kept per pixel channel, 1 to 8; 1 if images are binarised.
        binarize: Draw binary pixels with the intensity as their probability, anew at every use.
        flip: Mirror training images left to right with probability 1/2.
        num_workers: Processes that assemble batches; 0 does it in the training process.
        download_hint: How to get the data, for the error that says that they are missing.

    Attributes:
        num_train_images: Size of the training split, known after ``setup("fit")``.
        num_test_images: Size of the test split, known after any ``setup``.

    Raises:
        ValueError: If a number is out of its range.
    """

    num_train_images: int
    num_test_images: int

    def __init__(
        self,
        *,
        root: str | Path | None = None,
        batch_size: int,
        image_size: int,
        channels: int,
        bits: int,
        binarize: bool = False,
        flip: bool = False,
        num_workers: int = 0,
        download_hint: str = "",
    ) -> None:
        super().__init__()
        whole = range(1, sys.maxsize)
        _check("dataset.batch_size", batch_size, whole, "a whole number, at least 1")
        _check("dataset.image.size", image_size, whole, "a whole number, at least 1")
        _check("dataset.image.channels", channels, (1, 3), "1 (grey) or 3 (colour)")
        _check("dataset.image.bits", bits, range(1, 9), "a whole number from 1 to 8")
        if binarize and bits != 1:
            raise ValueError(
                f"dataset.image.bits: got {bits}, but binarised images have 1; set "
                "dataset.image.bits=1, or dataset.datamodule.binarize=false for grey levels"
            )
        _check(
            "dataset.num_workers", num_workers, range(sys.maxsize), "a whole number, at least 0"
        )
        # Absolute from the start: a command may change its working folder later.
        self.root = None if root is None else Path(root).expanduser().absolute()
        self.batch_size = batch_size
        self.image_size = image_size
        self.channels = channels
        self.bits = bits
        self.binarize = binarize
        self.flip = flip
        self.num_workers = num_workers
        self.download_hint = download_hint

    @abstractmethod
    def load(self, train: bool) -> UInt8[Tensor, "count channel height width"]:
        """Return all images of the training split (`train`) or of the test split."""

    @property
    def folder(self) -> Path:
        """`root`, for data that cannot do without.

        Raises:
            ValueError: If no root was given.
        """
        if self.root is None:
            raise ValueError(
                "dataset.root: got None, but this dataset is read from a folder; "
                "set dataset.root=FOLDER"
            )
        return self.root

    @cached_property
    def train_set(self) -> ImageDataset:
        """The training split, loaded at first use."""
        return self._load_checked(train=True)

    @cached_property
    def test_set(self) -> ImageDataset:
        """The test split, loaded at first use."""
        return self._load_checked(train=False)

    def setup(self, stage: str) -> None:
        """Load the splits that `stage` reads, once: both to fit, else the test split only.

        Raises:
            ValueError: If the data are missing or not of the configured shape.
        """
        if stage == "fit":
            self.num_train_images = len(self.train_set)
        self.num_test_images = len(self.test_set)

    def train_dataloader(self) -> DataLoader[UInt8[Tensor, "channel height width"]]:
        """Return shuffled training batches, all of them full.

        Raises:
            ValueError: If there are too few images for one batch.
        """
        if len(self.train_set) < self.batch_size:
            raise ValueError(
                f"dataset.batch_size: got {self.batch_size}, but there are only "
                f"{len(self.train_set)} training images and training takes full batches; "
                f"set dataset.batch_size={len(self.train_set)} or less"
            )
        return self._loader(self.train_set, train=True)

    def val_dataloader(self) -> DataLoader[UInt8[Tensor, "channel height width"]]:
        """Return the test split in its order; no dataset here has a third split."""
        return self._loader(self.test_set, train=False)

    def test_dataloader(self) -> DataLoader[UInt8[Tensor, "channel height width"]]:
        """Return the test split in its order."""
        return self._loader(self.test_set, train=False)

    def on_after_batch_transfer(
        self, batch: UInt8[Tensor, "batch channel height width"], dataloader_idx: int
    ) -> Float[Tensor, "batch channel height width"]:
        """Flip (in training only), then binarise or quantise, on the batch's device."""
        if self.flip and self.trainer is not None and self.trainer.training:
            batch = random_horizontal_flip(batch)
        return binarize(batch) if self.binarize else quantize(batch, self.bits)

    def _load_checked(self, train: bool) -> ImageDataset:
        images = self.load(train)
        _, channels, height, width = images.shape
        if channels != self.channels:
            raise ValueError(
                f"dataset.image.channels: got {self.channels}, but the images of "
                f"{type(self).__name__} have {channels}; set dataset.image.channels={channels}"
            )
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"dataset.image.size: got {self.image_size}, but the images of "
                f"{type(self).__name__} are {height}x{width}; set dataset.image.size={height}"
            )
        return ImageDataset(images)

    def _loader(
        self, dataset: ImageDataset, train: bool
    ) -> DataLoader[UInt8[Tensor, "channel height width"]]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=train,
            drop_last=train,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_already_a_batch,
        )


def _already_a_batch(batch: Batch) -> Batch:
    return batch


def _check(setting: str, value: int, allowed: Container[int], rule: str) -> None:
    # `type`, not isinstance: True is an int to Python, yet no number that anybody meant.
    if type(value) is not int or value not in allowed:
        raise ValueError(
            f"{setting}: got {value!r}, but it must be {rule}; set {setting} accordingly"
        )
