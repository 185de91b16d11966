"""Images of one size as a `Dataset` that gives whole batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

Batch = TypeVar("Batch")


class ImageDataset(Dataset[UInt8[Tensor, "channel height width"]]):
    """Images of one size, in memory or in a memory map.

    Args:
        images: All images. They come out channels last in memory, as convolutions are fastest.
    """

    def __init__(self, images: UInt8[np.ndarray, "count height width channel"]) -> None:
        self.images = images

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> UInt8[Tensor, "channel height width"]:
        """Return one image."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> UInt8[Tensor, "batch channel height width"]:
        """Return a batch by one index operation; `DataLoader` prefers this to `__getitem__`."""
        return torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2)

    def __getstate__(self) -> dict[str, Any]:
        """Leave a memory map out, which would be copied whole: a worker opens the file itself."""
        file = self.images.filename if isinstance(self.images, np.memmap) else None
        return {"images": self.images if file is None else Path(file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file again, if there was one."""
        images = state["images"]
        self.images = np.load(images, mmap_mode="r") if isinstance(images, Path) else images


def already_a_batch(batch: Batch) -> Batch:
    """Collate what `ImageDataset` gives, which is a batch."""
    return batch
