"""Images for measurements without a dataset."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.dataset import ImageDataset


class RandomImages(ImageDataModule):
    """Random bytes in memory, in the shape of a dataset's images.

    Args:
        num_batches: Number of batches per epoch.
        kwargs: Arguments of `ImageDataModule`.
    """

    def __init__(self, *, num_batches: int, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "validation_fraction": 0})
        self.num_batches = num_batches

    def prepare_data(self) -> None:
        """Do nothing: there are no files."""

    def setup(self, stage: str) -> None:
        """Do nothing: there are no files."""

    @property
    def splits(self) -> list[str]:
        """Name of the only split."""
        return ["train"]

    def load(self, split: str) -> ImageDataset:
        """Draw the images of an epoch."""
        count = self.num_batches * self.batch_size
        shape = (count, self.image.size, self.image.size, self.image.channels)
        generator = np.random.default_rng(self.seed)
        return ImageDataset(generator.integers(256, size=shape, dtype=np.uint8))
