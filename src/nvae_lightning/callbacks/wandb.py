"""Keeping the W&B runs of a sweep apart."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def _finish() -> None:
    import wandb

    if wandb.run is not None:
        wandb.finish()


class FinishWandb(Callback):
    """End the W&B run with the job, or the next job of the process would go on writing to it."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finish after the test; a training is followed by one."""
        if stage == "test":
            _finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Finish a run that failed."""
        _finish()
