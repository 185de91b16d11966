"""Custom map-style datasets as a data module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL.Image import Image as Picture
from torch import Tensor

from nvae_lightning.data.base import ImageDataModule
from nvae_lightning.data.dataset import ImageDataset
from nvae_lightning.data.decode import Decoder
from nvae_lightning.data.readers.base import from_pixels
from nvae_lightning.data.summary import Summary
from nvae_lightning.utilities.image import Image


class Datasets(ImageDataModule):
    """Data module of ``torch.utils.data.Dataset`` objects.

    An item is an image, or a tuple that starts with one such as ``(image, label)``. An image is
    a PIL image, a uint8 array (height, width, channel), or a tensor (channel, height, width) of
    uint8 or of floats in [0, 1], which are rounded to 8 bits. Images of another size or number
    of channels are converted like those of `ImageFolder`.

    Args:
        train: Images to train with.
        test: Images to test with.
        validation: Images to validate with; None holds out a part of `train`.
        batch_size, image, num_workers, seed, validation_fraction, split_seed, flip: See
            `ImageDataModule`.

    Raises:
        ValueError: If a setting is out of range, or an argument is not a map-style dataset.

    >>> pictures = [np.zeros((8, 8, 3), np.uint8)] * 20
    >>> data = Datasets(pictures, pictures, image=Image(channels=3, size=8, bits=8))
    >>> data.setup("fit")
    >>> len(data.train_set), len(data.validation_set)
    (19, 1)
    """

    def __init__(
        self,
        train: Any,  # noqa: ANN401 -- whatever has a length and items
        test: Any,  # noqa: ANN401
        validation: Any = None,  # noqa: ANN401
        *,
        batch_size: int = 32,
        image: Image | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        validation_fraction: float | int = 0.05,
        split_seed: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            image=image,
            num_workers=num_workers,
            seed=seed,
            validation_fraction=validation_fraction,
            split_seed=split_seed,
            flip=flip,
        )
        given = {"train": train, "validation": validation, "test": test}
        self._given = {name: items for name, items in given.items() if items is not None}
        for name, items in self._given.items():
            if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
                raise ValueError(
                    f"dataset.{name}: got {type(items).__name__}, but it must be a map-style "
                    "dataset, with __len__ and __getitem__"
                )

    @property
    def splits(self) -> Sequence[str]:
        """Names of the given splits."""
        return list(self._given)

    @property
    def is_prepared(self) -> bool:
        """False, because there are no files to prepare."""
        return False

    @property
    def summary(self) -> Summary:
        """Empty, because images are converted on use."""
        return Summary()

    def prepare_data(self) -> None:
        """Do nothing, because the datasets exist."""

    def load(self, split: str) -> ImageDataset:
        """Return a split."""
        return _Converted(self._given[split], self.decoder)


class _Converted(ImageDataset):
    """Items of a dataset as uint8 images of one size.

    Args:
        items: Dataset of images.
        decoder: Conversion of each image.
    """

    def __init__(self, items: Any, decoder: Decoder) -> None:  # noqa: ANN401
        self.images = items
        self.decoder = decoder
        self.chosen = None

    def __getitems__(self, indices: Sequence[int]) -> UInt8[Tensor, "batch channel height width"]:
        """Convert some images."""
        rows = indices if self.chosen is None else self.chosen[indices]
        pixels = np.stack([self._pixels(self.images[int(row)]) for row in rows])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _pixels(self, item: Any) -> UInt8[np.ndarray, "height width channel"]:  # noqa: ANN401
        image = item[0] if isinstance(item, tuple | list) else item
        if isinstance(image, Tensor):
            if image.is_floating_point():
                image = (image * 255).round().clamp(0, 255).byte()
            image = image.movedim(0, -1).numpy()
        if not isinstance(image, Picture):
            if image.shape == (self.decoder.size, self.decoder.size, self.decoder.channels):
                return image
            image = from_pixels(image)
        pixels, _ = self.decoder(image)
        return pixels
