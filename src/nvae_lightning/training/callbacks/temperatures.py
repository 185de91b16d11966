"""Samples at several temperatures, as in the paper's Fig. 4."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nvae_lightning.inference.batches import fork_torch
from nvae_lightning.inference.recalibration import recalibrate, with_statistics
from nvae_lightning.inference.sampling import sample_means
from nvae_lightning.training.callbacks.pictures import log_picture
from nvae_lightning.training.module import NVAEModule
from nvae_lightning.utilities import figures
from nvae_lightning.utilities.image import require_int


class Temperatures(Callback):
    """Write ``temperatures.png`` after the test: a row of samples per temperature.

    Batch normalisation is recalibrated for each temperature. The images of a column share their
    noise.

    Source: Vahdat & Kautz 2020, Sec. 4.2.

    Args:
        temperatures: Factors on the standard deviation of the priors.
        num_images: Number of images per temperature.
        num_passes: Number of passes of a recalibration; see :func:`recalibrate`.
        batch_size: Number of images per pass, both in recalibration and in sampling.
        seed: Seed of the noise.

    Raises:
        ValueError: If ``temperatures`` is empty, or a number is out of range.
    """

    def __init__(
        self,
        temperatures: Sequence[float],
        num_images: int = 10,
        num_passes: int = 500,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        name = "callbacks.temperatures"
        if not temperatures or not all(0.0 <= value < math.inf for value in temperatures):
            raise ValueError(
                f"{name}.temperatures: got {list(temperatures)}, but they must be finite and not "
                f"negative; set for example {name}.temperatures=[0.7,1.0]"
            )
        require_int(f"{name}.num_images", num_images, 1)
        require_int(f"{name}.num_passes", num_passes, 1)
        require_int(f"{name}.batch_size", batch_size, 1)
        self.temperatures = list(temperatures)
        self.num_images = num_images
        self.num_passes = num_passes
        self.batch_size = batch_size
        self.seed = seed

    @torch.no_grad()
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample on all ranks, which recalibrate batch normalisation together."""
        assert isinstance(pl_module, NVAEModule)
        model, device = pl_module.model, pl_module.device
        rows = []
        with fork_torch(device):
            for temperature in self.temperatures:
                statistics = recalibrate(
                    model, temperature, num_passes=self.num_passes, batch_size=self.batch_size,
                    seed=self.seed,
                )  # fmt: skip
                torch.manual_seed(self.seed)
                with with_statistics(model, statistics):
                    images = sample_means(model, self.num_images, self.batch_size, temperature)
                rows.append(images)
        if not trainer.is_global_zero:
            return
        labels = [f"t = {temperature:g}" for temperature in self.temperatures]
        path = Path(trainer.default_root_dir) / "temperatures.png"
        figures.write(figures.rows_of_images(torch.stack(rows), labels), path)
        log_picture(trainer, "test/temperatures", path)
