"""Exact resumption: state that Lightning does not save."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loops.evaluation_loop import RestartStage as ValidationStage
from lightning.pytorch.loops.fit_loop import RestartStage as FitStage
from lightning.pytorch.loops.training_epoch_loop import RestartStage as EpochStage
from lightning.pytorch.utilities import rank_zero_warn

from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.sampler import ResumableLoader
from nvae_lightning.serialization.checkpoints import LATEST_WEIGHTS
from nvae_lightning.training.csv_logger import ResumableCSVLogger
from nvae_lightning.training.module import is_logging_step

_KEY = "nvae_lightning"
_COUNTS = ("ready", "started", "processed", "completed")


class Resumption(Callback):
    """Continue metrics.csv, the data and the loops where the checkpoint was written.

    Lightning 2.6 does not restore the place in the data if a schedule depends on the number of
    training steps. It infers from the counts of its loops where in a step or an epoch the
    checkpoint was written, and miscounts steps; this callback sets the place explicitly.

    The place in the data is a number of images. With a different number of images per step, the
    rest of the epoch has a different number of steps; schedules count steps as before.

    Other data modules than this package's do not save a place. The states of the random number
    generators are saved instead, so that a resume from the end of an epoch is exact; within an
    epoch Lightning draws the remaining batches again.
    """

    def __init__(self) -> None:
        self._place: _Place | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the place in the data, and the metrics that are logged after the checkpoint."""
        row = {}
        if is_logging_step(trainer, trainer.global_step):
            metrics = trainer.logged_metrics
            row = {k: float(v) for k, v in metrics.items() if k.startswith("train/")}
            row["epoch"] = trainer.current_epoch
        checkpoint[_KEY] = {
            "global_batch_size": _global_batch_size(trainer),
            "last_row": row,
            "loader": None,
        }
        if (loader := _loader(trainer)) is not None:
            checkpoint[_KEY]["loader"] = loader.state_dict()
        else:
            checkpoint[_KEY]["random"] = _capture(trainer.strategy.root_device)
        _straighten(checkpoint)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the checkpoint's place, and continue metrics.csv from there."""
        if trainer.state.fn != "fit":
            return
        if LATEST_WEIGHTS in checkpoint and not _averages(trainer):
            pl_module.load_state_dict(checkpoint[LATEST_WEIGHTS])  # Lightning loads the averages
        state = checkpoint.get(_KEY)
        if state is None:
            return
        before, now = state["global_batch_size"], _global_batch_size(trainer)
        progress = checkpoint["loops"]["fit_loop"]
        batches = progress["epoch_loop.batch_progress"]["current"]
        self._place = _Place(
            loader=state["loader"],
            random=state.get("random"),
            epoch=progress["epoch_progress"]["current"]["completed"],
            num_batches=batches["ready"] * before // now if before and now else batches["ready"],
            is_last_batch=progress["epoch_loop.batch_progress"]["is_last_batch"],
            is_validated=batches["completed"] == batches["ready"],
        )
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, ResumableCSVLogger):
                    logger.resume(
                        checkpoint["global_step"],
                        state["last_row"],
                        is_validated=self._place.is_validated,
                    )
        if before and now and before != now:
            rank_zero_warn(
                f"the checkpoint was made with {before} images per step, this run has {now}; "
                "the epoch continues after the same images"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the loops and the loader, or the random number generators, to the place."""
        loader, place = _loader(trainer), self._place
        if loader is None:
            data = getattr(trainer, "datamodule", None)
            rank_zero_warn(
                f"{type(trainer.train_dataloader if data is None else data).__name__} does not "
                "save its place in an epoch: a run that is resumed from the end of an epoch "
                "continues exactly, one resumed within an epoch draws the rest of the epoch again"
            )
        if place is None:
            return
        if loader is not None and place.loader is not None:
            loader.load_state_dict(place.loader)
        if place.random is not None:
            device = trainer.strategy.root_device
            _restore(place.random, device, trainer.global_rank)
            assert trainer.fit_loop._data_fetcher is not None
            iter(trainer.fit_loop._data_fetcher)  # redraws the order
        _set_loops(trainer, place)
        self._place = None


@dataclass(frozen=True)
class _Place:
    """Place in the loops at which a checkpoint was written."""

    loader: dict[str, int] | None
    random: dict[str, Any] | None  # states of the generators, if the loader has no place
    epoch: int  # counted from 0
    num_batches: int  # trained on in this epoch
    is_last_batch: bool
    is_validated: bool  # whether the validation after the last batch, if due, is complete


def _set_loops(trainer: Trainer, place: _Place) -> None:
    """Set Lightning's loops to a place before they run."""
    loop, steps = trainer.fit_loop.epoch_loop, trainer.global_step
    limit, num_batches = trainer.num_training_batches, place.num_batches
    is_last = place.is_last_batch or num_batches >= limit
    if is_last and limit != math.inf:
        num_batches = int(limit)
    is_end = is_last and place.is_validated
    if is_end or num_batches == 0:  # start a new epoch
        _set_epoch(trainer, place.epoch + is_end, is_begun=False)
        trainer.fit_loop._restarting = loop.restarting = False
        trainer.fit_loop.reset_restart_stage()
        loop.reset_restart_stage()
        loop._batches_that_stepped = steps
        return
    _set_epoch(trainer, place.epoch, is_begun=True)
    trainer.fit_loop._restart_stage = FitStage.RESTARTED_MID_EPOCH
    loop._restart_stage = EpochStage.RESTARTED_ON_LAST
    loop.batch_progress.is_last_batch = is_last
    for counts in (loop.batch_progress.current, loop.batch_progress.total):
        ready = num_batches if counts is loop.batch_progress.current else counts.ready
        counts.load_state_dict(dict.fromkeys(_COUNTS, ready))
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    # Lightning counts the step again when a validation is due, even if it is complete.
    is_due = loop._should_check_val_fx(fetcher)
    loop._batches_that_stepped = steps - (is_due and not loop._should_accumulate())
    if is_due and not place.is_validated:
        loop.val_loop.restarting = False
        loop.val_loop._restart_stage = ValidationStage.RESTARTED_MID_EVALUATION
    elif is_last:
        loop.val_loop._has_run = True  # otherwise Lightning would train on another batch


def _set_epoch(trainer: Trainer, epoch: int, *, is_begun: bool) -> None:
    progress = trainer.fit_loop.epoch_progress
    counts = {"processed": epoch, "completed": epoch}
    counts |= dict.fromkeys(("ready", "started"), epoch + is_begun)
    for part in (progress.current, progress.total):
        part.load_state_dict(counts)


def _straighten(checkpoint: dict[str, Any]) -> None:
    """Set the counts of a checkpoint to those of an uninterrupted run.

    Lightning calls the hooks of an epoch's end even if the training ends within the epoch, and
    after a resume it counts the previous validation as one of the current epoch.
    """
    progress = checkpoint["loops"]["fit_loop"]
    batches = progress["epoch_loop.batch_progress"]
    is_validated = batches["current"]["ready"] == batches["current"]["completed"]
    is_end = is_validated and batches["is_last_batch"]
    epoch = checkpoint["epoch"] = progress["epoch_progress"]["current"]["ready"] - 1
    for counts in progress["epoch_progress"].values():
        counts.update(ready=epoch + 1, started=epoch + 1)
        counts.update(processed=epoch + is_end, completed=epoch)
    num_steps = checkpoint["global_step"] - (not is_validated)
    progress["epoch_loop.state_dict"]["_batches_that_stepped"] = num_steps
    validation = progress["epoch_loop.val_loop.batch_progress"]["total"]
    validation.update(dict.fromkeys(validation, 0))


def _loader(trainer: Trainer) -> ResumableLoader[Any] | None:
    loader = trainer.train_dataloader
    return loader if isinstance(loader, ResumableLoader) else None


def _averages(trainer: Trainer) -> bool:
    callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return any(isinstance(callback, WeightAveraging) for callback in callbacks)


def _global_batch_size(trainer: Trainer) -> int | None:
    data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    return data.batch_size * trainer.world_size if isinstance(data, ImageDataModule) else None


def _capture(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, NumPy's, torch's and the device's generators."""
    name, keys, position, *gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.tensor(np.asarray(keys).tolist()), position, *gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore(states: dict[str, Any], device: torch.device, rank: int) -> None:
    """Restore the first rank's states from :func:`_capture`; other ranks draw other numbers."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    if rank:
        torch.manual_seed(torch.initial_seed() + rank)
