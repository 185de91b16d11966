"""Train, test and picture a model: ``python -m nvae_lightning.train dataset=… model=…``."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from nvae_lightning.cli import CONFIG_ROOT, one_line_errors, run


@rank_zero_only
def load_data(datamodule: LightningDataModule) -> None:
    """Load the data, which Lightning does too late: after loggers have begun to write."""
    datamodule.prepare_data()
    datamodule.setup("fit")


def check_checkpoint(path: str | None, folder: Path) -> None:
    """Raise ValueError if there is no checkpoint to go on from."""
    if path == "last" and not any(folder.glob("*.ckpt")):
        raise ValueError(
            f"ckpt_path=last: no checkpoint in '{folder}'; "
            "name the folder of the run to go on with as hydra.run.dir=FOLDER"
        )
    if path not in (None, "last") and not Path(path).is_file():
        raise ValueError(f"ckpt_path: '{path}' does not exist; give a checkpoint file, or last")


@rank_zero_only
def set_aside(metrics: Path) -> None:
    """Keep the metrics of the run that is gone on with, which the CSV logger would delete."""
    if metrics.exists():
        number = len(list(metrics.parent.glob("metrics.*.csv")))
        metrics.rename(metrics.with_name(f"metrics.{number}.csv"))


@hydra.main(version_base="1.3", config_path=str(CONFIG_ROOT / "conf"), config_name="train")
@one_line_errors()
def main(config: DictConfig) -> float:
    """Run one training as configured and return its test bits per dim, for sweeps."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    config.run_dir = str(run_dir)
    # Hydra has already put its own files there, which the CSV logger would warn about.
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")
    # Lightning 2.6's use of a class that torch deprecates: nothing a user could change.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
    seed_everything(config.seed, workers=True, verbose=False)

    datamodule = instantiate(config.dataset.datamodule)
    check_checkpoint(config.ckpt_path, run_dir / "checkpoints")
    load_data(datamodule)
    set_aside(run_dir / "metrics.csv")
    module = instantiate(config.module, _convert_="all")
    if config.compile:
        module.model.compile()
    if 0 < config.trainer.max_steps < config.trainer.log_every_n_steps:
        config.trainer.log_every_n_steps = config.trainer.max_steps
    trainer = instantiate(
        config.trainer,
        default_root_dir=str(run_dir),
        callbacks=list(instantiate(config.callbacks, _convert_="all").values()),
        logger=list(instantiate(config.logger, _convert_="all").values()),
        _convert_="all",
    )
    if trainer.world_size > 1 and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise ValueError(
            f"trainer.devices: a sweep runs on one device, got {trainer.world_size}; start its "
            "jobs one by one, or set trainer.devices=1"
        )
    resolved = OmegaConf.to_container(config, resolve=True)
    rank_zero_only(OmegaConf.save)(OmegaConf.create(resolved), run_dir / "config.yaml")
    for logger in trainer.loggers:
        logger.log_hyperparams(resolved)

    try:
        trainer.fit(module, datamodule, ckpt_path=config.ckpt_path)
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise ValueError(
            f"ckpt_path={config.ckpt_path}: the checkpoint is of another model; "
            "repeat the settings in the config.yaml beside its folder"
        ) from error
    trainer.save_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    metrics = trainer.test(module, datamodule, verbose=False)
    return metrics[0]["test/bpd"] if metrics else math.nan


if __name__ == "__main__":
    run(main)
