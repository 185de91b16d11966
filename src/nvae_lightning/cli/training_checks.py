"""Checks of a training before it writes anything."""

from __future__ import annotations

import os

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig

from nvae_lightning.cli.command import is_search
from nvae_lightning.cli.setting_types import check_seed, check_type, check_types
from nvae_lightning.data import ImageDataModule


def check_training(config: DictConfig) -> None:
    """Check the types of all settings, and the ranges of those that no class of ours checks.

    Raises:
        ValueError: If a setting is of a wrong type or out of range.
    """
    check_types(config)
    check_seed(config.seed)
    for name in ("compile", "cuda_graphs"):
        check_type(name, config[name], bool)
    check_type("ckpt_path", config.ckpt_path, str | None)
    if HydraConfig.get().mode is RunMode.MULTIRUN and "TORCHELASTIC_RUN_ID" in os.environ:
        if int(os.environ["WORLD_SIZE"]) > 1:
            raise ValueError(
                "hydra.mode: got MULTIRUN, but torchrun cannot start a sweep; set trainer=ddp"
            )
    trainer = config.trainer
    for name, value, minimum in (
        ("trainer.num_nodes", trainer.num_nodes, 1),
        ("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, 1),
        ("trainer.log_every_n_steps", trainer.log_every_n_steps, 0),
        ("trainer.check_val_every_n_epoch", trainer.check_val_every_n_epoch, 1),
        ("trainer.num_sanity_val_steps", trainer.num_sanity_val_steps, -1),
        ("trainer.max_steps", trainer.max_steps, -1),
        ("trainer.max_epochs", trainer.max_epochs, -1),
    ):
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")
    for name in ("max_steps", "max_epochs"):
        if trainer[name] == 0:
            raise ValueError(f"trainer.{name} must be positive, got 0; -1 disables the limit")
    if trainer.max_steps == -1 and trainer.max_epochs in (-1, None):
        raise ValueError(
            f"trainer.max_steps and trainer.max_epochs: got {trainer.max_steps} and "
            f"{trainer.max_epochs}, but schedules require an end of the training; set one of them"
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
def check_loaders(datamodule: LightningDataModule, trainer: Trainer) -> None:
    """Build the loaders of this package's data; Lightning builds them after loggers start.

    Raises:
        ValueError: If there are fewer images than the devices need.
    """
    if isinstance(datamodule, ImageDataModule):
        datamodule.trainer = trainer
        datamodule.train_dataloader()
        datamodule.val_dataloader()


@rank_zero_only
def check_metrics(config: DictConfig, datamodule: LightningDataModule, trainer: Trainer) -> None:
    """Check that there is validation data for the metrics that callbacks and searches use.

    Without it, only ``callbacks.best`` is accepted, which is part of every run and saves nothing.

    Raises:
        ValueError: If there is none, or `optimized_metric` is a metric of the test split.
    """
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
