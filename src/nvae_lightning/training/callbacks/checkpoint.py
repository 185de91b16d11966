"""Checkpoints of a training, ordered by their steps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from nvae_lightning.serialization.checkpoints import LAST, step_of
from nvae_lightning.utilities.files import check_not_deleted


class Checkpoint(ModelCheckpoint):
    """Save every so many steps and at the end; keep a few, the latest of them as last.ckpt, too.

    Checkpoints of a folder are ordered by their steps. Those of another run, and those after the
    one that this run resumes from, are set aside in a folder beside them.

    Args:
        dirpath: Folder of the checkpoints.
        every_n_train_steps: Optimiser steps between two checkpoints.
        keep: Number of checkpoints to keep: more than one, or a damaged one could not be replaced.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, dirpath: str, *, every_n_train_steps: int = 1000, keep: int = 2) -> None:
        for name, value in (("every_n_train_steps", every_n_train_steps), ("keep", keep)):
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"callbacks.checkpoint.{name} must be a whole number, at least 1, "
                    f"got {value!r}"
                )
        super().__init__(
            dirpath=dirpath,
            filename="step{step:07d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps,
            save_top_k=-1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.keep = keep
        self._num_kept_steps = -1

    @property
    def state_key(self) -> str:
        """Another interval is no other callback."""
        return type(self).__name__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take away what an interrupted write has left."""
        super().setup(trainer, pl_module, stage)
        if trainer.is_global_zero:
            for path in Path(str(self.dirpath)).glob(".*.partial"):
                path.unlink()

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set aside what is not of this run's past: its steps would be taken for the latest."""
        folder, resumed = Path(str(self.dirpath)), trainer.ckpt_path
        folder.mkdir(parents=True, exist_ok=True)
        present, last_step = sorted(folder.glob("*.ckpt")), -1
        if resumed is not None and Path(resumed).resolve().parent == folder.resolve():
            last_step = step_of(Path(resumed).resolve())
            self._link(Path(resumed).resolve())
        later = [path for path in present if step_of(path.resolve()) > last_step]
        if not later:
            return
        number = len(list(folder.glob("earlier.*")))
        aside = folder / f"earlier.{number}"
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        rank_zero_info(f"{len(later)} checkpoints of an earlier run are now in '{aside}'")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Save, but not within a step, and not yet in an epoch's or the training's last one.

        Nor while steps are skipped, so that what to go back to is not pruned.
        """
        loop = trainer.fit_loop.epoch_loop
        is_within = loop.batch_progress.is_last_batch or loop._should_accumulate()
        if not (is_within or is_last_step(trainer) or _is_skipping(trainer)):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was due in the last step, after its validation: it need not be repeated."""
        is_due = trainer.global_step - self._last_global_step_saved >= self._every_n_train_steps
        is_end = trainer.global_step == getattr(pl_module, "total_steps", None)
        if (is_due and not _is_skipping(trainer)) or is_end or trainer.should_stop:
            self.save_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the end came earlier than expected."""
        self.save_now(trainer)

    def save_now(self, trainer: Trainer, *, again: bool = False) -> None:
        """Save unless this step's checkpoint is there; or again, at another place in the loops."""
        if again or self._last_global_step_saved != trainer.global_step:
            name = self.format_checkpoint_name(self._monitor_candidates(trainer))
            self._save_checkpoint(trainer, name)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if trainer.is_global_zero:
            check_not_deleted(Path(filepath).parent)
        # What has been logged until now must not be lost with the process.
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
        super()._save_checkpoint(trainer, filepath)
        self._link_and_prune(Path(filepath))

    @rank_zero_only
    def _link_and_prune(self, newest: Path) -> None:
        self._link(newest)
        saved = sorted(newest.parent.glob("step*.ckpt"), key=step_of)
        for path in saved[: -self.keep]:
            path.unlink()

    def _link(self, newest: Path) -> None:
        if newest.name == LAST:
            return
        link = newest.with_name(LAST)
        temporary = link.with_name(f".{LAST}.partial")
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(newest.name)
        except OSError:  # a file system without links
            shutil.copyfile(newest, temporary)
        temporary.replace(link)


def is_last_step(trainer: Trainer) -> bool:
    """Whether the step just made is the last of a training that ends after a number of steps.

    It is saved after any validation: Lightning makes none after a resume that has no step left.
    """
    return trainer.global_step == trainer.max_steps


def _is_skipping(trainer: Trainer) -> bool:
    return any(getattr(callback, "is_skipping", False) for callback in trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
