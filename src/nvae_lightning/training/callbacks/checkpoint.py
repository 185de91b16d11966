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
from nvae_lightning.utilities.files import whole_file
from nvae_lightning.utilities.image import require_int


class Checkpoint(ModelCheckpoint):
    """Save at an interval and at the end; keep a few, with ``last.ckpt`` as a link to the latest.

    The checkpoints in a folder are ordered by step. Checkpoints of another run, and those after
    the one from which this run resumes, are moved to a subfolder.

    Args:
        dirpath: Folder of the checkpoints.
        every_n_train_steps: Optimiser steps between two checkpoints.
        keep: Number of checkpoints to keep; an older one replaces a damaged one.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, dirpath: str, *, every_n_train_steps: int = 1000, keep: int = 2) -> None:
        require_int("callbacks.checkpoint.every_n_train_steps", every_n_train_steps, 1)
        require_int("callbacks.checkpoint.keep", keep, 1)
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

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: the same at any interval."""
        return type(self).__name__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the partial files of interrupted writes."""
        super().setup(trainer, pl_module, stage)
        if trainer.is_global_zero:
            for path in Path(str(self.dirpath)).glob(".*.partial.*"):
                path.unlink()

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set aside checkpoints with more steps than this run."""
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
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
        """Save at the interval.

        Not within an accumulated step; not in the last step of an epoch or of the training, which
        is saved after its validation; and not while steps are skipped, because the checkpoints to
        roll back to must not be pruned.
        """
        loop = trainer.fit_loop.epoch_loop
        is_within = loop.batch_progress.is_last_batch or loop._should_accumulate()
        if not (is_within or is_last_step(trainer) or _is_skipping(trainer)):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if due, after the validation, so that a resume does not repeat it."""
        is_due = trainer.global_step - self._last_global_step_saved >= self._every_n_train_steps
        is_end = trainer.global_step == getattr(pl_module, "total_steps", None)
        if (is_due and not _is_skipping(trainer)) or is_end or trainer.should_stop:
            self.save_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the training ended earlier than planned."""
        self.save_now(trainer)

    def save_now(self, trainer: Trainer, *, again: bool = False) -> None:
        """Save, unless this step is already saved.

        Args:
            trainer: Trainer to save.
            again: Whether to save this step again, at a later place in Lightning's loops.
        """
        is_due = again or self._last_global_step_saved != trainer.global_step
        if is_due and not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            name = self.format_checkpoint_name(self._monitor_candidates(trainer))
            self._save_checkpoint(trainer, name)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        # A checkpoint's metrics must be on disk, in case the process is killed.
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
        with whole_file(newest.with_name(LAST)) as link:
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(newest.name)
            except OSError:  # a file system without links
                shutil.copyfile(newest, link)


def is_last_step(trainer: Trainer) -> bool:
    """Return whether this step is the last of ``trainer.max_steps``.

    It is saved after its validation, which Lightning skips in a resume without further steps.
    """
    return trainer.global_step == trainer.max_steps


def _is_skipping(trainer: Trainer) -> bool:
    return any(getattr(callback, "is_skipping", False) for callback in trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
