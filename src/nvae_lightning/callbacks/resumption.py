"""What a resumed run needs beyond what Lightning saves."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from nvae_lightning.callbacks.csv_logger import ResumableCSVLogger
from nvae_lightning.data.sampler import ResumableLoader
from nvae_lightning.module import is_logging_step

_KEY = "nvae_lightning"


class Resumption(Callback):
    """Go on with metrics.csv, and with the data, also on another number of devices.

    Lightning restores the place in the data too, but not once anything has asked for the number of
    steps of the training, as schedules have to.

    The place in the data is a number of images. With other images per step than before, the rest
    of the epoch has another number of steps; schedules count steps as ever.
    """

    def __init__(self) -> None:
        self._place: dict[str, int] | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the images per batch, and the metrics that are written after the checkpoint."""
        row = {}
        if is_logging_step(trainer, trainer.global_step):
            metrics = trainer.logged_metrics
            row = {k: float(v) for k, v in metrics.items() if k.startswith("train/")}
            row["epoch"] = trainer.current_epoch
        checkpoint[_KEY] = {
            "global_batch_size": _global_batch_size(trainer),
            "last_row": row,
            "loader": _loader(trainer).state_dict(),
        }
        _straighten(checkpoint["loops"]["fit_loop"], trainer.current_epoch)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Set the loggers and the place in the epoch to the checkpoint's."""
        state = checkpoint.get(_KEY)
        if state is None or trainer.state.fn != "fit":
            return
        self._place = state["loader"]
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, ResumableCSVLogger):
                    logger.resume(checkpoint["global_step"], state["last_row"])
        before, now = state["global_batch_size"], _global_batch_size(trainer)
        if before != now:
            rank_zero_warn(
                f"the checkpoint was made with {before} images a step, this run has {now}; "
                "the epoch goes on after the same images"
            )
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
            not_completed = progress["ready"] - progress["completed"]
            num_batches = progress["ready"] * before // now
            for name in ("ready", "started", "processed"):
                progress[name] = num_batches
            progress["completed"] = num_batches - not_completed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the loader to the place in the epoch."""
        if self._place is not None:
            _loader(trainer).load_state_dict(self._place)
            self._place = None


def _straighten(progress: dict[str, Any], epoch: int) -> None:
    """Set the counts of a checkpoint to what they are in a first run.

    In a run that was resumed at the end of an epoch, Lightning 2.6 has begun one epoch less than
    it has come to, and counts the validation before as one of this epoch: a run resumed from
    there again would repeat a step.
    """
    batches = progress["epoch_loop.batch_progress"]["current"]
    is_end = batches["ready"] == batches["completed"]  # of the epoch, not within a batch
    for counts in progress["epoch_progress"].values():
        counts.update(ready=epoch + 1, started=epoch + 1, processed=epoch + is_end)
        counts.update(completed=epoch)
    validation = progress["epoch_loop.val_loop.batch_progress"]["total"]
    validation.update(dict.fromkeys(validation, 0))


def _loader(trainer: Trainer) -> ResumableLoader[Any]:
    loader = trainer.train_dataloader
    assert isinstance(loader, ResumableLoader)
    return loader


def _global_batch_size(trainer: Trainer) -> int:
    return trainer.datamodule.batch_size * trainer.world_size  # pyright: ignore
