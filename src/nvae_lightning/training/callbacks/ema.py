"""Averaged weights for validation, test and pictures."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging


class EMA(EMAWeightAveraging):
    """Exponential moving average of the weights, but not of the buffers, by Lightning.

    The model has the averaged weights during the whole validation, including pictures, if this
    callback is listed after those that draw. It keeps them after the training.

    Args:
        decay: Weight of the old average in every step, from 0 to below 1.

    Raises:
        ValueError: If ``decay`` is out of range.
    """

    def __init__(self, decay: int | float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay must be at least 0 and below 1, got {decay}")
        super().__init__(decay=decay, use_buffers=False)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: see :meth:`on_validation_start`."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: see :meth:`on_validation_end`."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the averaged weights in."""
        if self._average_model is not None:
            self._swap_models(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the latest weights back in."""
        if self._average_model is not None:
            self._swap_models(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the average, with the extra state of the latest model."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        latest = checkpoint.get("current_model_state", {})
        extra = {name: value for name, value in latest.items() if name.endswith("_extra_state")}
        checkpoint["state_dict"].update(extra)
