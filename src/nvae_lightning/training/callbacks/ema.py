"""Averaged weights, with which a model is validated, tested and pictured."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging


class EMA(EMAWeightAveraging):
    """Lightning's exponential moving average of the weights; buffers are the latest.

    The average is in place during the whole of a validation, so that pictures are made with it,
    too; it must stand behind the callbacks that draw them. After the training the model keeps it.

    Args:
        decay: share of the old average that is kept at every step, 0 to 1.

    Raises:
        ValueError: if it is out of range.
    """

    def __init__(self, decay: int | float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay must be at least 0 and below 1, got {decay}")
        super().__init__(decay=decay, use_buffers=False)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: see :meth:`on_validation_start`."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: see :meth:`on_validation_end`."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in place."""
        if self._average_model is not None:
            self._swap_models(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the latest weights back."""
        if self._average_model is not None:
            self._swap_models(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the average; what has been initialised stays so in it."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        latest = checkpoint.get("current_model_state", {})
        extra = {name: value for name, value in latest.items() if name.endswith("_extra_state")}
        checkpoint["state_dict"].update(extra)
