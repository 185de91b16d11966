"""From the batch of a data loader to the input of a model."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
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

    Further items, for example labels, are ignored.

    Raises:
        ValueError: If the batch is anything else.
    """
    images = batch[0] if isinstance(batch, tuple | list) and len(batch) > 0 else batch
    if isinstance(images, Tensor):
        return images
    raise ValueError(
        f"batch: got a {type(batch).__name__}, but it must be a tensor of images, or a tuple or "
        "list that starts with one, such as (images, labels); return that from the dataset or the "
        "DataLoader's collate_fn"
    )


def seed_torch(*entropy: int) -> None:
    """Seed torch with a hash of numbers."""
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def fork_torch(*devices: torch.device) -> AbstractContextManager[None]:
    """Restore torch's random states on exit, on the CPU and on some devices."""
    return torch.random.fork_rng([device for device in {*devices} if device.type == "cuda"])


class SeededModule(LightningModule):
    """LightningModule that seeds the random numbers of every batch.

    All random numbers of a batch, from flips to latents, depend only on the seed, the rank and the
    batch's position in the run, so a resumed training draws the same numbers as an uninterrupted
    one. The seed comes from Lightning's ``seed_everything``, or else from PyTorch at the start of
    the trainer.
    """

    _seed = 0

    def setup(self, stage: str) -> None:
        """Keep PyTorch's seed, which seeding each batch overwrites."""
        self._seed = torch.initial_seed()

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:  # noqa: ANN401
        # Lightning calls this even if a data module overrides the hooks of the transfer.
        if (trainer := self._trainer) is not None:
            seed = int(os.environ.get("PL_GLOBAL_SEED", self._seed))
            seed_torch(seed, *_place(trainer), trainer.global_rank)
        return super()._on_before_batch_transfer(batch, dataloader_idx)


def _place(trainer: Trainer) -> tuple[int, int, int]:
    """Return the position in the run of the batch that is about to be transferred.

    In training it is the epoch and the number of images of all ranks up to the end of the
    batch, and does not depend on the number of ranks.
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
                f"module.model: got {type(model).__name__}, but it must be a "
                "nvae_lightning.model.NVAE; give one"
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
