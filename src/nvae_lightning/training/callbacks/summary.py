"""A summary of the results."""

from __future__ import annotations

import time

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from nvae_lightning.inference.batches import images_of
from nvae_lightning.inference.metrics import groups_of
from nvae_lightning.training.module import NVAEModule


class Summary(Callback):
    """Print the results of a run after its test: likelihoods, speed, and the run's folder."""

    def __init__(self) -> None:
        self._started = 0.0
        self._seconds = 0.0
        self._num_images = 0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started, self._num_images = time.perf_counter(), 0
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Count images."""
        self._num_images += len(images_of(batch)) * trainer.world_size

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds = time.perf_counter() - self._started

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        assert isinstance(pl_module, NVAEModule)
        metrics = trainer.callback_metrics
        hierarchy = pl_module.model.hierarchy
        active = float(sum(groups_of(metrics, "test/active_channels")))
        table = Table("", "nats per image", "bits per dim", title="Test", title_justify="left")
        for name in metrics:
            if name.startswith("test/elbo"):
                suffix = name.removeprefix("test/elbo")  # of a loader, if there are several
                label = suffix.replace("/dataloader_idx_", ", loader ")
                table.add_row(
                    f"ELBO (negative){label}",
                    f"{-metrics[f'test/elbo{suffix}']:.2f}",
                    f"{metrics[f'test/bpd{suffix}']:.4f}",
                )
                table.add_row(
                    f"NLL ({pl_module.num_importance_samples} importance samples){label}",
                    f"{metrics[f'test/nll{suffix}']:.2f}",
                    f"{metrics[f'test/nll_bpd{suffix}']:.4f}",
                )
        console = Console()
        console.print(table)
        num_channels = hierarchy.num_groups * hierarchy.latent_channels
        console.print(f"active channels  {active:.1f} of {num_channels}")
        if self._seconds:
            num_steps = trainer.global_step - self._first_step
            console.print(
                f"trained          {num_steps} steps in {self._seconds:.0f} s, "
                f"{self._num_images / self._seconds:.0f} images per second, including validation"
            )
        console.print(f"everything is in {trainer.default_root_dir}", soft_wrap=True)
