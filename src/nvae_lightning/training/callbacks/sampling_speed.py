"""Speed of sampling."""

from __future__ import annotations

import statistics
import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nvae_lightning.inference.batches import fork_torch
from nvae_lightning.training.module import NVAEModule
from nvae_lightning.utilities.image import require_int


class SamplingSpeed(Callback):
    """Log ``test/sampling_ms_per_image``: the median over batches of samples after the test.

    The time covers the pass from noise to the means of p(x | z), in the training's precision,
    after one warm-up batch.

    Source: Vahdat & Kautz 2020, Sec. 4.3.

    Args:
        batch_size: Number of images per batch.
        num_batches: Number of timed batches.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, batch_size: int = 36, num_batches: int = 10) -> None:
        require_int("callbacks.sampling_speed.batch_size", batch_size, 1)
        require_int("callbacks.sampling_speed.num_batches", num_batches, 1)
        self.batch_size = batch_size
        self.num_batches = num_batches

    @torch.no_grad()
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample, and log the time."""
        assert isinstance(pl_module, NVAEModule)
        device = pl_module.device
        seconds = []
        # The samples must not shift other random numbers.
        with fork_torch(device), trainer.precision_plugin.forward_context():
            for _ in range(1 + self.num_batches):
                synchronize(device)
                started = time.perf_counter()
                pl_module.model.sample(self.batch_size)
                synchronize(device)
                seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds[1:])
        pl_module.log(
            "test/sampling_ms_per_image", 1000.0 * median / self.batch_size, sync_dist=True
        )


def synchronize(device: torch.device) -> None:
    """Wait for the device's pending computations."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
