"""Explore a model and runs on a local page: ``python -m nvae_lightning.explore ckpt_path=…``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from nvae_lightning.cli.building import build_inference_trainer
from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.runs import find_runs, load_run
from nvae_lightning.cli.setting_types import check_type
from nvae_lightning.cli.trained import trained_model, training_data
from nvae_lightning.data.dataset import ImageDataset
from nvae_lightning.model import NVAE
from nvae_lightning.utilities.image import require_int
from nvae_lightning.utilities.signals import if_ended

if TYPE_CHECKING:
    from nvae_lightning.explorer.workspace import Workspace


def load_test_set(config: DictConfig, model: NVAE) -> ImageDataset | None:
    """Load the test images of the named dataset, or else of the training's if they are here.

    Only a named dataset may be downloaded.

    Raises:
        ValueError: If a named dataset is not available.
    """
    is_named = HydraConfig.get().runtime.choices.get("dataset") is not None
    try:
        datamodule = training_data(config, model)
        if is_named:
            datamodule.prepare_data()
        datamodule.setup("test")
    except ValueError as error:
        if is_named:
            raise
        print(f"no test images: {error}")
        return None
    return datamodule.test_set


def load_workspace(config: DictConfig) -> Workspace:
    """Load the model and its test images."""
    from nvae_lightning.explorer.workspace import Workspace

    require_int("num_reference_images", config.num_reference_images, 1)
    require_int("recalibration.num_passes", config.recalibration.num_passes, 1)
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    trainer = build_inference_trainer(config, run_dir, single=True)
    model = trained_model(config).to(memory_format=torch.channels_last)
    return Workspace(
        model.to(trainer.strategy.root_device),
        load_test_set(config, model),
        memory_budget=int(config.memory_budget),
        num_reference_images=config.num_reference_images,
        num_passes=config.recalibration.num_passes,
        precision=trainer.precision_plugin.forward_context,
    )


@command("explore")
def main(config: DictConfig) -> None:
    """Serve the page until it is stopped."""
    check_type("ckpt_path", config.ckpt_path, str | None)
    check_type("runs", config.runs, str | None)
    check_type("server_port", config.server_port, int)
    check_type("memory_budget", config.memory_budget, float)
    if config.ckpt_path is None and config.runs is None:
        raise ValueError("ckpt_path: got null, and runs too; set ckpt_path=PATH or runs=FOLDER")
    folder = None if config.runs is None else Path(config.runs).expanduser().absolute()
    if folder is not None and not folder.is_dir():
        raise ValueError(f"runs: '{folder}' is not a folder; give one that contains runs")
    try:
        from nvae_lightning.explorer.page import build_page, serve
        from nvae_lightning.explorer.training import Runs
    except ImportError as error:
        raise ValueError(
            f"the page requires the package gradio ({error}); install it with "
            "pip install 'nvae-lightning[explore]'"
        ) from error
    if_ended("the page is stopped")
    workspace = None if config.ckpt_path is None else load_workspace(config)
    runs = None if folder is None else Runs(folder, lambda path: [*find_runs(path)], load_run)
    page = build_page(workspace, runs)
    address = serve(page, config.server_name, config.server_port)
    print(f"{address} (Ctrl-C stops it)", flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    run(main)
