"""Build the module and the trainer of a config, and save the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from omegaconf import DictConfig, OmegaConf

from nvae_lightning.cli.machine import HALF, check_precision
from nvae_lightning.inference.loading import initialize_from
from nvae_lightning.training.callbacks import Preemption
from nvae_lightning.training.module import NVAEModule
from nvae_lightning.utilities.files import whole_file


@rank_zero_only
def save_config(config: DictConfig | dict[Any, Any], path: Path) -> None:
    """Write the settings atomically, with their interpolations resolved."""
    with whole_file(path) as partial:
        OmegaConf.save(OmegaConf.create(config), partial, resolve=True)


def build_module(config: DictConfig) -> NVAEModule:
    """Build the module to train and apply the compute settings to its model."""
    module = instantiate(config.module, _convert_="all")
    instantiate(config.compute, compile=config.compile).apply(module.model)
    if config.compile:
        rank_zero_info(
            "compile: the first steps compile the model, without progress, for minutes unless the "
            "compiler's cache has it; compile=false starts at once and is slower later"
        )
    return module


def initialize(config: DictConfig, module: NVAEModule) -> None:
    """Start from the trained weights of ``init_from``, if set; list the weights that do not fit.

    Raises:
        ValueError: If the weights are missing, damaged or of another architecture.
    """
    if config.init_from is None:
        return
    kept = initialize_from(module.model, config.init_from, strict=config.init_strict)
    if kept:
        rest = f" and {len(kept) - 10:,} more" if len(kept) > 10 else ""
        rank_zero_warn(
            f"init_from: {len(kept):,} weights have other shapes in '{config.init_from}' or are "
            f"missing there and keep their initial values: {', '.join(kept[:10])}{rest}"
        )


def build_trainer(config: DictConfig, run_dir: Path) -> Trainer:
    """Build Lightning's trainer with its callbacks and loggers.

    Raises:
        ValueError: If this machine does not support a setting.
    """
    precision = config.trainer.precision
    check_precision("trainer.precision", precision, config.trainer.accelerator)
    kinds = {"enable_progress_bar": ProgressBar, "enable_checkpointing": ModelCheckpoint}
    unused = tuple(kind for name, kind in kinds.items() if config.trainer[name] is False)
    callbacks = instantiate(config.callbacks, _convert_="all").values()
    callbacks = [each for each in callbacks if not isinstance(each, unused)]
    # Preemption ends the training after a step, when all others have been called.
    callbacks.sort(key=lambda callback: isinstance(callback, Preemption))
    trainer = instantiate(
        config.trainer,
        default_root_dir=str(run_dir),
        callbacks=callbacks,
        logger=list(instantiate(config.logger, _convert_="all").values()),
        _convert_="all",
    )
    if str(precision) in HALF:  # as published; Lightning's 2^16 costs a few steps more
        trainer.precision_plugin.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    return trainer


def build_inference_trainer(
    config: DictConfig, run_dir: Path, *callbacks: Callback, single: bool = False
) -> Trainer:
    """Build Lightning's trainer for a trained model.

    Args:
        config: All settings.
        run_dir: Folder of the results.
        callbacks: Callbacks of the trainer.
        single: Whether the command runs on one device only.

    Raises:
        ValueError: If this machine does not support a setting.
    """
    check_precision("trainer.precision", config.trainer.precision, config.trainer.accelerator)
    trainer = instantiate(
        config.trainer, default_root_dir=str(run_dir), callbacks=list(callbacks), _convert_="all"
    )
    if single:
        check_single(trainer)
    return trainer


def check_single(trainer: Trainer) -> None:
    """Check that a trainer uses one device.

    Raises:
        ValueError: If it uses several.
    """
    if trainer.world_size > 1:
        raise ValueError(
            f"trainer.devices: got {trainer.world_size} in all, but this command runs on one; set "
            "trainer.devices=1 trainer.num_nodes=1 trainer.strategy=auto"
        )
