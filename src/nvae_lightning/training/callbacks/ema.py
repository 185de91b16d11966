"""Averaged weights for validation, test and pictures."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from nvae_lightning.serialization.checkpoints import LATEST_WEIGHTS


class EMA(WeightAveraging):
    r"""Exponential moving average of the weights; buffers are the latest.

    .. math::
        \bar\theta_t = d_t \bar\theta_{t-1} + (1 - d_t) \theta_t, \qquad
        d_t = \min(d, (1 + t) / (10 + t))

    The decay starts low, so that the initial weights do not stay in the average of a short
    training. Source: Child 2021 (VDVAE), which evaluates averaged weights; the start is that of
    TensorFlow's ``ExponentialMovingAverage``.

    The model has the averaged weights during the whole validation, including pictures, if this
    callback is listed after those that draw. It keeps them after the training.

    Args:
        decay: Weight :math:`d` of the old average, from 0 to 1.

    Raises:
        ValueError: If ``decay`` is out of range.
    """

    def __init__(self, decay: int | float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        super().__init__(use_buffers=False, multi_avg_fn=self._update)

    @torch.no_grad()
    def _update(self, averages: Any, latest: Any, num_averaged: Tensor | int) -> None:  # noqa: ANN401
        step = int(num_averaged)
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, latest, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the weights in the trainer's precision, which Lightning converts them to later."""
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            trainer.precision_plugin.convert_module(self._average_model)

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
        latest = checkpoint.get(LATEST_WEIGHTS, {})
        extra = {name: value for name, value in latest.items() if name.endswith("_extra_state")}
        checkpoint["state_dict"].update(extra)
