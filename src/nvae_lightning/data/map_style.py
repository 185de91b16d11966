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
from nvae_lightning.data.readers.base import Source, Splits, from_pixels
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
        ValueError: If a setting is out of range.

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
        sources = {name: _Items(items) for name, items in given.items() if items is not None}
        self._sources = Splits("datasets", sources)

    def load(self, split: str) -> ImageDataset:
        """Return a split."""
        return _Converted(self._sources.sources[split], self.decoder)


class _Items(Source):
    """Items of a dataset as images.

    Args:
        items: Dataset of images, or of tuples that start with one.
    """

    def __init__(self, items: Any) -> None:  # noqa: ANN401
        super().__init__([f"{index:08d}" for index in range(len(items))])
        self.items = items

    def image(self, index: int) -> Picture:
        """Return an image."""
        item = self.items[index]
        image = item[0] if isinstance(item, tuple | list) else item
        if isinstance(image, Tensor):
            if image.is_floating_point():
                image = (image * 255).round().clamp(0, 255).byte()
            image = image.movedim(0, -1).numpy()
        return image if isinstance(image, Picture) else from_pixels(image)


class _Converted(ImageDataset):
    """Images of a source that are converted on use.

    Args:
        source: Images of any size.
        decoder: Conversion of each image.
    """

    def __init__(self, source: Source, decoder: Decoder) -> None:
        self.images = source
        self.decoder = decoder
        self.chosen = None

    def __getitems__(self, indices: Sequence[int]) -> UInt8[Tensor, "batch channel height width"]:
        """Convert some images."""
        rows = indices if self.chosen is None else self.chosen[indices]
        pixels = np.stack([self.decoder(self.images.image(int(row)))[0] for row in rows])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)
