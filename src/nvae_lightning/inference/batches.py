"""Batches as data loaders give them, on their way to a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor

from nvae_lightning.model import NVAE
from nvae_lightning.model.images import check_shape

Images = Float[Tensor, "batch channel height width"]


def images_of(batch: object) -> Tensor:
    """Return the images of a batch: a tensor, or the first item of a tuple or list.

    What follows the images in a tuple, such as the labels of torchvision's datasets, is ignored.

    Raises:
        ValueError: If the batch is anything else.
    """
    images = batch[0] if isinstance(batch, tuple | list) and len(batch) > 0 else batch
    if isinstance(images, Tensor):
        return images
    found = type(batch).__name__
    if isinstance(batch, Mapping):
        found += f" of {', '.join(map(repr, batch))}"
    elif images is not batch:
        found += f" that begins with {type(images).__name__}"
    raise ValueError(
        f"batch: got a {found}, but the module takes a tensor of images, or a tuple or list that "
        "begins with one, as (images, labels); return that from the dataset, or from the "
        "DataLoader's collate_fn"
    )


class ImageModule(LightningModule):
    """LightningModule that gives the images of its batches to a model.

    The values of the first batch of each data loader and stage are checked, the shape and dtype
    of every batch.

    Args:
        model: what the images are given to.
    """

    def __init__(self, model: NVAE) -> None:
        super().__init__()
        if not isinstance(model, NVAE):
            raise ValueError(
                f"module.model: got {type(model).__name__}, but it must be an NVAE; "
                "give one that is built by nvae_lightning.model.NVAE"
            )
        self.model = model.to(memory_format=torch.channels_last)
        self._checked: set[tuple[str, int]] = set()

    def setup(self, stage: str) -> None:
        """Let the first batches be checked, which may be of other data than the last time."""
        self._checked.clear()

    def _input(self, batch: object, stage: str, dataloader_idx: int = 0) -> Images:
        """Return a batch's images, of the model's dtype and laid out as convolutions like it."""
        x = images_of(batch)
        key = (stage, dataloader_idx)
        if key not in self._checked:
            self.model.check_images(x, finite=not self._is_guarded(stage), name=f"{stage} images")
            self._checked.add(key)
        check_shape(x, self.model.image, f"{stage} images")
        return x.to(self.dtype, memory_format=torch.channels_last)

    def _is_guarded(self, stage: str) -> bool:
        """Whether steps on images that are not finite are skipped (see `callbacks.Guard`)."""
        callbacks: list[object] = getattr(self._trainer, "callbacks", [])
        return stage == "train" and any(hasattr(callback, "is_skipping") for callback in callbacks)
