"""Images to measure with where there is no dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8

from nvae_lightning.data import ImageDataModule


class RandomImages(ImageDataModule):
    """Random bytes in memory, of the shape of a dataset's images.

    Args:
        num_batches: in an epoch.
        kwargs: `ImageDataModule`'s.
    """

    def __init__(self, *, num_batches: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_batches = num_batches

    def prepare_data(self) -> None:
        """Nothing has to be there."""

    def setup(self, stage: str) -> None:
        """Nothing has to be loaded."""

    def images(self, split: str) -> UInt8[np.ndarray, "count height width channel"]:
        """Draw them."""
        count = self.num_batches * self.batch_size
        shape = (count, self.image_size, self.image_size, self.channels)
        return np.random.default_rng(self.seed).integers(256, size=shape, dtype=np.uint8)
