"""What a training's config describes: the module, the trainer, and the file that records it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from nvae_lightning.cli.machine import HALF, check_precision
from nvae_lightning.training.callbacks import Preemption
from nvae_lightning.training.module import NVAEModule, check_cuda_graphs
from nvae_lightning.utilities.files import whole_file


@rank_zero_only
def save_config(resolved: dict[Any, Any], path: Path) -> None:
    """Write the settings, whole or not at all."""
    with whole_file(path) as partial:
        OmegaConf.save(OmegaConf.create(resolved), partial)


def build_module(config: DictConfig) -> NVAEModule:
    """Build what is trained, and let it be computed as configured."""
    module = instantiate(config.module, _convert_="all")
    instantiate(config.compute, compile=config.compile).apply(module.model)
    return module


def build_trainer(config: DictConfig, run_dir: Path) -> Trainer:
    """Build Lightning's trainer with its callbacks and loggers.

    Raises:
        ValueError: If a setting cannot be had on this machine.
    """
    precision = config.trainer.precision
    check_precision("trainer.precision", precision, config.trainer.accelerator)
    if 0 < config.trainer.max_steps < config.trainer.log_every_n_steps:
        config.trainer.log_every_n_steps = config.trainer.max_steps
    unused: tuple[type[Callback], ...] = ()
    if config.trainer.enable_progress_bar is False:
        unused += (ProgressBar,)
    if config.trainer.enable_checkpointing is False:
        unused += (ModelCheckpoint,)
    callbacks = [
        callback
        for callback in instantiate(config.callbacks, _convert_="all").values()
        if not isinstance(callback, unused)
    ]
    # It ends the training after a step, when all the others have had their turn.
    callbacks.sort(key=lambda callback: isinstance(callback, Preemption))
    trainer = instantiate(
        config.trainer,
        default_root_dir=str(run_dir),
        callbacks=callbacks,
        logger=list(instantiate(config.logger, _convert_="all").values()),
        _convert_="all",
    )
    if config.cuda_graphs:
        check_cuda_graphs(trainer)
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
        ValueError: If the machine cannot do what is set.
    """
    check_precision("trainer.precision", config.trainer.precision, config.trainer.accelerator)
    trainer = instantiate(
        config.trainer,
        default_root_dir=str(run_dir),
        callbacks=list(callbacks),
        _convert_="all",
    )
    if single and trainer.world_size > 1:
        raise ValueError(
            f"trainer.devices: got {trainer.world_size} in all, but this command runs on one; set "
            "trainer.devices=1 trainer.num_nodes=1 trainer.strategy=auto"
        )
    return trainer
