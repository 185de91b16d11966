"""From the batch of a data loader to the input of a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
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


class SeededModule(LightningModule):
    """LightningModule that seeds the random numbers of every batch.

    What is drawn for a batch, from flips to latents, depends only on the seed, the rank and the
    place of the batch in the run, so a resumed training draws what the uninterrupted one would
    have drawn. The seed is that of Lightning's ``seed_everything``, else PyTorch's seed when the
    trainer starts.
    """

    _seed = 0

    def setup(self, stage: str) -> None:
        """Note PyTorch's seed, which that of each batch replaces."""
        self._seed = torch.initial_seed()

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:  # noqa: ANN401
        # Lightning calls this whether or not a data module overrides the hooks of the transfer.
        if (trainer := self._trainer) is not None:
            seed = int(os.environ.get("PL_GLOBAL_SEED", self._seed))
            entropy = np.random.SeedSequence([seed, *_place(trainer), trainer.global_rank])
            torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
        return super()._on_before_batch_transfer(batch, dataloader_idx)


def _place(trainer: Trainer) -> tuple[int, int, int]:
    """Return the place of the batch that is about to be transferred.

    In training it is the epoch and the number of images of all ranks up to the end of the batch:
    the same on any number of ranks that share the batch.
    """
    if trainer.training:
        num_batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready + 1
        if num_batches >= trainer.num_training_batches:
            return 0, trainer.current_epoch + 1, 0
        batch_size = getattr(trainer.train_dataloader, "batch_size", None) or 1
        return 0, trainer.current_epoch, num_batches * batch_size * trainer.world_size
    if trainer.predicting:
        loop = trainer.predict_loop
    elif trainer.testing:
        loop = trainer.test_loop
    elif trainer.state.fn == "fit":
        loop = trainer.fit_loop.epoch_loop.val_loop
    else:
        loop = trainer.validate_loop
    return 1, trainer.global_step, loop.batch_progress.current.ready


class ImageModule(SeededModule):
    """LightningModule that passes the images of its batches to a model.

    Pixel values are checked in the first batch of each data loader and stage, shapes and dtypes in
    every batch.

    Args:
        model: Model that the images are passed to.
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
        """Check the first batches again: they may come from other data."""
        super().setup(stage)
        self._checked.clear()

    def _input(self, batch: object, stage: str, dataloader_idx: int = 0) -> Images:
        """Return a batch's images in the model's dtype and in the channels-last layout."""
        x = images_of(batch)
        key = (stage, dataloader_idx)
        if key not in self._checked:
            self.model.check_images(x, finite=not self._is_guarded(stage), name=f"{stage} images")
            self._checked.add(key)
        check_shape(x, self.model.image, f"{stage} images")
        return x.to(self.dtype, memory_format=torch.channels_last)

    def _is_guarded(self, stage: str) -> bool:
        """Whether a callback skips steps on non-finite images (see `callbacks.Guard`)."""
        callbacks: list[object] = getattr(self._trainer, "callbacks", [])
        return stage == "train" and any(hasattr(callback, "is_skipping") for callback in callbacks)
