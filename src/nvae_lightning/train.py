"""Train, test and picture a model: ``python -m nvae_lightning.train dataset=… model=…``."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import warnings
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf

from nvae_lightning.cli.building import build_module, build_trainer, check_metrics, save_config
from nvae_lightning.cli.command import command, is_search, run
from nvae_lightning.cli.command_line import as_single_run
from nvae_lightning.cli.machine import hide_warnings, keep_freed_memory
from nvae_lightning.cli.resume import check_resume
from nvae_lightning.cli.setting_types import build_datamodule, check_seed, check_type, check_types
from nvae_lightning.data import ImageDataModule
from nvae_lightning.inference import loading
from nvae_lightning.serialization.checkpoints import BEST, last_checkpoint, read_checkpoint
from nvae_lightning.training.callbacks import start_wandb
from nvae_lightning.training.slurm import requeued_at_sigusr1
from nvae_lightning.utilities.environment import device_name, version
from nvae_lightning.utilities.files import check_not_deleted
from nvae_lightning.utilities.plain_yaml import read_yaml
from nvae_lightning.utilities.signals import Interrupted, if_ended


@rank_zero_only
def load_data(datamodule: LightningDataModule) -> None:
    """Load our own data, which Lightning does too late: after loggers have begun to write."""
    if not isinstance(datamodule, ImageDataModule):
        return
    datamodule.prepare_data()
    datamodule.setup("fit")
    if isinstance(datamodule, ImageDataModule):
        print("\n".join(datamodule.summary.lines()))


@rank_zero_only
def check_batches(datamodule: LightningDataModule, trainer: Trainer) -> None:
    """Look whether the images are enough for the devices, which Lightning does too late, too."""
    if not isinstance(datamodule, ImageDataModule):
        return
    datamodule.trainer = trainer
    for loader in (datamodule.train_dataloader, datamodule.val_dataloader):
        loader()


def check_settings(config: DictConfig) -> None:
    """Check the settings that are not a class of this package's.

    Raises:
        ValueError: If one is of another type than it should be, or out of range.
    """
    check_types(config)
    check_seed(config.seed)
    for name in ("compile", "cuda_graphs"):
        check_type(name, config[name], bool)
    check_type("ckpt_path", config.ckpt_path, str | None)
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
            f"trainer.max_steps and trainer.max_epochs, got {trainer.max_steps} and "
            f"{trainer.max_epochs}, leave the training without an end, which its schedules need: "
            "set one of them"
        )


def find_checkpoint(path: str | None, folder: Path) -> Path | None:
    """Return the whole checkpoint to resume from; None for a new training.

    Raises:
        ValueError: If it is asked for and not there, or damaged.
    """
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    found = last_checkpoint(folder) if path == "last" or requeued else None
    if found is not None or path is None:
        return found
    if path == "last" or (path == "best" and not (folder / BEST).exists()):
        raise ValueError(
            f"ckpt_path={path}: no intact checkpoint in '{folder}'; "
            "name the folder of the run to resume as hydra.run.dir=FOLDER"
        )
    if path == "best":
        path = str(folder / BEST)
    if Path(path).expanduser().is_dir():
        try:
            found = loading.find_checkpoint(path)
        except ValueError as error:
            raise ValueError(f"ckpt_path: {error}") from error
        if found is None:
            raise ValueError(
                f"ckpt_path: '{path}' holds weights without the state of a training; give the "
                "folder of a run, or one of its checkpoints"
            )
        return found
    read_checkpoint(Path(path).expanduser())
    return Path(path).expanduser().absolute()


@rank_zero_only
def set_aside(metrics: Path, *, move: bool) -> None:
    """Keep the metrics of another run, or those that going on from a checkpoint may drop."""
    if metrics.exists():
        number = len(list(metrics.parent.glob("metrics.*.csv")))
        copy = metrics.with_name(f"metrics.{number}.csv")
        metrics.rename(copy) if move else shutil.copyfile(metrics, copy)


def run_id(run_dir: Path, *, resumed: bool) -> str:
    """Return the name of the W&B run: that of the run that is gone on with."""
    config = run_dir / "config.yaml"
    if resumed and config.exists():
        earlier = read_yaml(config).get("run_id")
        if isinstance(earlier, str) and re.fullmatch(r"[\w-]+", earlier):
            return earlier
    return secrets.token_hex(4)


@command("train", resumes=True)
@requeued_at_sigusr1()
def main(config: DictConfig) -> float | None:
    """Run one training as configured; return its `optimized_metric` for sweeps, if measured."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    config.run_dir = str(run_dir)
    # Hydra has already put its own files there, which the CSV logger would warn about.
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")
    # DDP's advice on 1x1 kernels, whose two memory formats are one.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    hide_warnings()
    keep_freed_memory()
    if_ended("the training has not begun")
    check_settings(config)
    seed_everything(config.seed, workers=True, verbose=False)

    datamodule = build_datamodule(config)
    checkpoint = find_checkpoint(config.ckpt_path, run_dir / "checkpoints")
    if checkpoint is not None:
        check_resume(config, checkpoint, run_dir)
    load_data(datamodule)
    config.run_id = run_id(run_dir, resumed=checkpoint is not None)
    config.version = version()
    module = build_module(config)
    trainer = build_trainer(config, run_dir)
    config.device = device_name(trainer.strategy.root_device, trainer.world_size)
    config.num_devices = trainer.world_size
    check_batches(datamodule, trainer)
    check_metrics(config, datamodule, trainer)
    start_wandb(trainer.loggers)
    is_new = checkpoint is None or config.ckpt_path not in (None, "last")
    if is_new and not config.trainer.fast_dev_run:
        set_aside(run_dir / "metrics.csv", move=checkpoint is None)
    if trainer.world_size > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise ValueError("hydra.mode: a sweep is not started by torchrun; use trainer=ddp")
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    resolved["overrides"] = OmegaConf.to_container(HydraConfig.get().overrides.task)
    if not config.trainer.fast_dev_run:
        save_config(resolved, run_dir / "config.yaml")
    for logger in trainer.loggers:
        logger.log_hyperparams({str(name): value for name, value in resolved.items()})

    resume = f"ckpt_path=last hydra.run.dir={run_dir}"
    with as_single_run(run_dir):
        if_ended(f"steps after the last checkpoint are not saved; resume with {resume}")
        try:
            trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
        except Interrupted as interrupted:
            if interrupted.is_saved:
                if_ended(f"everything is saved; resume with {resume}")
            raise
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise ValueError(
                f"ckpt_path={config.ckpt_path}: the checkpoint is of another model; "
                "repeat the settings in the config.yaml beside its folder"
            ) from error
        result = trainer.callback_metrics.get(config.optimized_metric)
        if is_overridden("test_dataloader", datamodule, LightningDataModule):
            if_ended(f"the training is saved, its test has no results; test with {resume}")
            trainer.test(module, datamodule, verbose=False)
        else:
            name = type(datamodule).__name__
            rank_zero_warn(f"{name} has no test_dataloader: the model is not tested")
    if trainer.is_global_zero:
        check_not_deleted(run_dir)
    if result is None and is_search():
        raise ValueError(
            f"optimized_metric: got {config.optimized_metric}, which was not measured; validation "
            f"follows every {config.trainer.check_val_every_n_epoch} epochs "
            "(trainer.check_val_every_n_epoch): train longer, or set a smaller number"
        )
    return None if result is None else float(result)


if __name__ == "__main__":
    run(main)
