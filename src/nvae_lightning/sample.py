"""Draw pictures from a trained model: ``python -m nvae_lightning.sample ckpt_path=… mode=…``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from nvae_lightning.backends import Compute
from nvae_lightning.cli.building import build_inference_trainer
from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.setting_types import plain
from nvae_lightning.cli.trained import images_for, trained_model, training_data
from nvae_lightning.data import ImageDataModule
from nvae_lightning.inference.loading import find_checkpoint
from nvae_lightning.inference.recalibration import cached_recalibration
from nvae_lightning.inference.sampling import Settings
from nvae_lightning.model import NVAE
from nvae_lightning.serialization.hub import shipped_models
from nvae_lightning.utilities.files import whole_file
from nvae_lightning.utilities.images import as_pixels, write_grid

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # all keep weights in float32


def load_images(config: DictConfig, model: NVAE, count: int) -> Tensor:
    """Load the first of ``images``, or images spread over the test split.

    Raises:
        ValueError: If there are too few.
    """
    is_own = config.images is not None
    datamodule: ImageDataModule = (
        images_for(config, model, "images") if is_own else training_data(config, model)
    )
    datamodule.prepare_data()
    datamodule.setup("test")
    available = len(datamodule.test_set)
    if available < count:
        raise ValueError(
            f"num_samples: {count} images are needed, but there are only {available}; set a "
            "smaller num_samples"
        )
    step = 1 if is_own else available // count  # a split may be sorted by class
    batch = datamodule.test_set.__getitems__([step * index for index in range(count)])
    return datamodule.to_input(batch, train=False)


def statistics(
    config: DictConfig, model: NVAE, temperature: float | list[float], folder: Path
) -> Mapping[str, Tensor]:
    """Measure batch normalisation statistics of samples, cached beside the user's own models."""
    source = find_checkpoint(config.ckpt_path)
    local = Path(config.ckpt_path).expanduser()
    if source is not None:
        folder = source.parent
    elif local.is_dir() and config.ckpt_path not in shipped_models():
        folder = local
    name = "model" if source is None else source.stem
    counts = plain(config.recalibration)
    return cached_recalibration(model, folder, name, temperature, seed=config.seed, **counts)


@command("sample")
def main(config: DictConfig) -> None:
    """Draw one picture and also save its images as an array."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    trainer = build_inference_trainer(config, run_dir, single=True)
    if trainer.precision not in _PRECISIONS:
        raise ValueError(
            f"trainer.precision: got {config.trainer.precision}, but it must be one of "
            f"{', '.join(_PRECISIONS)}"
        )
    device = trainer.strategy.root_device
    model = trained_model(config).to(memory_format=torch.channels_last).to(device)
    Compute(compile=config.compile).apply(model)
    torch.manual_seed(config.seed)
    temperature = plain(config.temperature)
    model.temperature_of_groups(temperature)
    recalibrate = partial(statistics, config, model, temperature, run_dir)
    settings = Settings(
        model,
        config.num_samples,
        temperature,
        load=lambda count: load_images(config, model, count).to(device),
        batch_size=config.batch_size,
        statistics=recalibrate if config.recalibrate_bn else None,
    )
    with trainer.precision_plugin.forward_context():
        drawing = instantiate(config.mode)(settings)
    mode = HydraConfig.get().runtime.choices["mode"]
    picture, numbers = run_dir / f"{mode}.png", run_dir / f"{mode}.npz"
    write_grid(drawing.images, drawing.num_columns, picture)
    pixels = as_pixels(drawing.images).numpy()
    with whole_file(numbers) as file:
        np.savez_compressed(file, images=pixels)
    print(f"{len(pixels)} images in '{picture}' and {numbers.name}")


if __name__ == "__main__":
    run(main)
