"""Images of one size as a `Dataset` that returns whole batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

Batch = TypeVar("Batch")


class ImageDataset(Dataset[UInt8[Tensor, "channel height width"]]):
    """Images of one size, in memory or in a memory map.

    Args:
        images: All images. Batches are channels last in memory, which convolutions prefer.
    """

    def __init__(self, images: UInt8[np.ndarray, "count height width channel"]) -> None:
        self.images = images
        self.chosen: Int64[np.ndarray, " used"] | None = None

    def subset(self, chosen: Int64[np.ndarray, " used"]) -> ImageDataset:
        """Return a view of some images."""
        part = copy.copy(self)
        part.chosen = chosen
        return part

    def hold_out(self, fraction: float | int, seed: int) -> tuple[ImageDataset, ImageDataset]:
        """Split off a random part; both it and the rest have at least one image.

        Args:
            fraction: Fraction to split off.
            seed: Seed of the draw.

        Returns:
            The rest and the part, both in order.
        """
        num_held_out = min(max(round(fraction * len(self)), 1), len(self) - 1)
        order = np.random.default_rng(seed).permutation(len(self))
        held_out, kept = order[:num_held_out], order[num_held_out:]
        return self.subset(np.sort(kept)), self.subset(np.sort(held_out))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images if self.chosen is None else self.chosen)

    def __getitem__(self, index: int) -> UInt8[Tensor, "channel height width"]:
        """Return one image."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> UInt8[Tensor, "batch channel height width"]:
        """Return a batch with one index operation; `DataLoader` prefers this to `__getitem__`."""
        rows = indices if self.chosen is None else self.chosen[indices]
        return torch.from_numpy(self.images[rows]).permute(0, 3, 1, 2)

    def __getstate__(self) -> dict[str, Any]:
        """Replace a memory map by the name of its file, instead of copying all images."""
        file = self.images.filename if isinstance(self.images, np.memmap) else None
        return {**self.__dict__, "images": self.images if file is None else Path(file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file again, if there was one."""
        self.__dict__.update(state)
        if isinstance(self.images, Path):
            self.images = np.load(self.images, mmap_mode="r")


def already_a_batch(batch: Batch) -> Batch:
    """Return a batch unchanged, as the collate function of whole batches."""
    return batch
