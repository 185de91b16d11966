"""Peak memory of a training."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nvae_lightning.training.module import is_logging_step
from nvae_lightning.utilities.live_bytes import LiveBytes, kept_bytes

_COUNTED_STEP = 2  # the first step creates the optimiser's state


class PeakMemory(Callback):
    """Log ``train/peak_memory_gib``: the peak size of all tensors on a device.

    On a GPU the allocator counts from the start of the training. Elsewhere this counts the tensors
    of an early step, the weights and the optimiser's state, because the memory of the process
    would include earlier jobs of a sweep.
    """

    def __init__(self) -> None:
        self._counter: LiveBytes | None = None
        self._peak_bytes = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the count."""
        self._peak_bytes = 0
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Start counting, in one step and only without a GPU."""
        is_due = self._peak_bytes == 0 and trainer.global_step + 1 >= _COUNTED_STEP
        if is_due and pl_module.device.type != "cuda":
            self._counter = LiveBytes()
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Log at logging steps."""
        if self._counter is not None:
            self._peak_bytes = kept_bytes(pl_module, trainer.optimizers) + self._counter.peak
            self._stop()
        if pl_module.device.type == "cuda":
            self._peak_bytes = torch.cuda.max_memory_allocated(pl_module.device)
        if self._peak_bytes and is_logging_step(trainer, trainer.global_step):
            pl_module.log("train/peak_memory_gib", self._peak_bytes / 2**30)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop counting."""
        self._stop()

    def _stop(self) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None
