"""Images per second between two logging steps."""

from __future__ import annotations

import time

from lightning.pytorch import Callback, LightningModule, Trainer

from nvae_lightning.inference.batches import images_of
from nvae_lightning.training.module import is_logging_step


class Throughput(Callback):
    """Log ``train/images_per_second`` over all devices, excluding the time of validation."""

    def __init__(self) -> None:
        self._started = 0.0
        self._num_images = 0

    def _restart(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started, self._num_images = time.perf_counter(), 0

    # A run that resumes within an epoch has no start of an epoch.
    on_train_start = on_train_epoch_start = on_validation_end = _restart

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Count images; log at logging steps."""
        self._num_images += len(images_of(batch)) * trainer.world_size
        if is_logging_step(trainer, trainer.global_step):
            elapsed = time.perf_counter() - self._started
            pl_module.log("train/images_per_second", self._num_images / elapsed)
            self._restart(trainer, pl_module)
