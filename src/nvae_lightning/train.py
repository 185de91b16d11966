"""Train, test and picture a model: ``python -m nvae_lightning.train dataset=… model=…``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf

from nvae_lightning.cli.building import build_module, build_trainer, initialize, save_config
from nvae_lightning.cli.command import command, is_search, run
from nvae_lightning.cli.command_line import as_single_run
from nvae_lightning.cli.overrides import as_typed
from nvae_lightning.cli.resume import check_resume, run_id
from nvae_lightning.cli.setting_types import build_datamodule
from nvae_lightning.cli.training_checks import check_data, check_loaders, check_training
from nvae_lightning.training.callbacks import start_wandb
from nvae_lightning.training.callbacks.preemption import requeued_at_sigusr1
from nvae_lightning.training.checkpoints import checkpoint_to_resume
from nvae_lightning.training.csv_logger import set_aside
from nvae_lightning.training.module import NVAEModule
from nvae_lightning.utilities.environment import device_name, version
from nvae_lightning.utilities.signals import Interrupted, if_ended


def fit(
    trainer: Trainer,
    module: NVAEModule,
    datamodule: LightningDataModule,
    checkpoint: Path | None,
    ckpt_path: str | None,
) -> None:
    """Train; after a signal, print how to resume.

    Raises:
        ValueError: If the checkpoint belongs to another model.
    """
    if_ended(f"steps after the last checkpoint are not saved; resume with {_resume()}")
    try:
        trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
    except Interrupted as interrupted:
        if interrupted.is_saved:
            if_ended(f"everything is saved; resume with {_resume()}")
        raise
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise ValueError(
            f"ckpt_path={ckpt_path}: the checkpoint is of another model; "
            "repeat the settings in the config.yaml beside its folder"
        ) from error


def _resume() -> str:
    return f"ckpt_path=last {as_typed('hydra.run.dir', HydraConfig.get().runtime.output_dir)}"


@command("train", resumes=True)
@requeued_at_sigusr1
def main(config: DictConfig) -> float | None:
    """Run one training as configured; return its `optimized_metric` for sweeps, if measured."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if_ended("the training has not begun")
    check_training(config)
    seed_everything(config.seed, workers=True, verbose=False)

    datamodule = build_datamodule(config)
    checkpoint = checkpoint_to_resume(config.ckpt_path, run_dir / "checkpoints")
    if checkpoint is not None:
        check_resume(config, checkpoint, run_dir)
    check_data(datamodule)
    config.run_id = run_id(run_dir, resumed=checkpoint is not None)
    config.version = version()
    module = build_module(config)
    if checkpoint is None:
        initialize(config, module)
    trainer = build_trainer(config, run_dir)
    check_loaders(config, datamodule, trainer)
    config.device = device_name(trainer.strategy.root_device, trainer.world_size)
    config.num_devices = trainer.world_size
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    resolved["overrides"] = OmegaConf.to_container(HydraConfig.get().overrides.task)
    start_wandb(trainer.loggers)
    if not config.trainer.fast_dev_run:
        if checkpoint is None or config.ckpt_path not in (None, "last"):
            set_aside(run_dir / "metrics.csv", move=checkpoint is None)
        save_config(resolved, run_dir / "config.yaml")
    for logger in trainer.loggers:
        logger.log_hyperparams(resolved)

    with as_single_run(run_dir):
        fit(trainer, module, datamodule, checkpoint, config.ckpt_path)
        result = trainer.callback_metrics.get(config.optimized_metric)
        if is_overridden("test_dataloader", datamodule, LightningDataModule):
            if_ended(f"the training is saved, its test has no results; test with {_resume()}")
            trainer.test(module, datamodule, verbose=False)
        else:
            name = type(datamodule).__name__
            rank_zero_warn(f"{name} has no test_dataloader: the model is not tested")
    if result is None and is_search():
        raise ValueError(
            f"optimized_metric: got {config.optimized_metric}, which was not measured; validation "
            f"follows every {config.trainer.check_val_every_n_epoch} epochs "
            "(trainer.check_val_every_n_epoch): train longer, or set a smaller number"
        )
    return None if result is None else float(result)


if __name__ == "__main__":
    run(main)
