"""Checks of a training before it writes any file."""

from __future__ import annotations

import os

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig

from nvae_lightning.cli.command import is_search
from nvae_lightning.cli.setting_types import check_type
from nvae_lightning.data import ImageDataModule


def check_training(config: DictConfig) -> None:
    """Check settings that no class of ours checks.

    Raises:
        ValueError: If one is out of range.
    """
    check_type("ckpt_path", config.ckpt_path, str | None)
    check_type("init_from", config.init_from, str | None)
    if HydraConfig.get().mode is RunMode.MULTIRUN and "TORCHELASTIC_RUN_ID" in os.environ:
        if int(os.environ["WORLD_SIZE"]) > 1:
            raise ValueError(
                "hydra.mode: got MULTIRUN, but torchrun cannot start a sweep; set trainer=ddp"
            )
    trainer = config.trainer
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if trainer[name] is not None and trainer[name] < 1:
            raise ValueError(f"trainer.{name} must be at least 1, got {trainer[name]}")
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if 0 in (steps, epochs) or (steps == -1 and epochs in (-1, None)):
        raise ValueError(
            f"trainer.max_steps and trainer.max_epochs: got {steps} and {epochs}, but schedules "
            "require an end of the training; set one of them, and -1 for no limit by the other"
        )


@rank_zero_only
def check_data(datamodule: LightningDataModule) -> None:
    """Load this package's data and print a summary; Lightning loads them after loggers start.

    Raises:
        ValueError: If data are missing or damaged.
    """
    if isinstance(datamodule, ImageDataModule):
        datamodule.prepare_data()
        datamodule.setup("fit")
        print("\n".join(datamodule.summary.lines()))


@rank_zero_only
def check_loaders(config: DictConfig, datamodule: LightningDataModule, trainer: Trainer) -> None:
    """Check that there are batches for all devices, and validation data for the metrics.

    Without validation data, only ``callbacks.best`` is accepted, which is part of every run and
    saves nothing.

    Raises:
        ValueError: If there are fewer images than the devices need, no validation data for the
            metrics of callbacks and searches, or `optimized_metric` is a metric of the test split.
    """
    if isinstance(datamodule, ImageDataModule):
        datamodule.trainer = trainer
        datamodule.train_dataloader()
    metric = str(config.optimized_metric)
    if metric.startswith("test/"):
        raise ValueError(
            f"optimized_metric: got {metric}, but nothing is selected on the test split; set "
            "optimized_metric=val/bpd"
        )
    if _has_validation(datamodule, trainer):
        return
    used = {
        f"callbacks.{name}.monitor": callback.get("monitor")
        for name, callback in (config.callbacks or {}).items()
        if name != "best"
    }
    if is_search():
        used["optimized_metric"] = metric
    for setting, value in used.items():
        if str(value).startswith("val/"):
            raise ValueError(
                f"{setting}: got {value}, but there are no validation images; hold out some "
                "of the training images with dataset.validation_fraction=0.1"
            )


def _has_validation(datamodule: LightningDataModule, trainer: Trainer) -> bool:
    if trainer.limit_val_batches == 0:
        return False
    if isinstance(datamodule, ImageDataModule):
        return bool(datamodule.val_dataloader())
    return is_overridden("val_dataloader", datamodule, LightningDataModule)
