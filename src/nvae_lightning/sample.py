"""Draw pictures from a trained model: ``python -m nvae_lightning.sample ckpt_path=… mode=…``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from nvae_lightning.backends import Compute
from nvae_lightning.cli.building import build_inference_trainer
from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.machine import hide_warnings, keep_freed_memory
from nvae_lightning.cli.setting_types import check_settings, check_types, plain
from nvae_lightning.cli.trained import images_for, trained_model, training_data
from nvae_lightning.data import ImageDataModule
from nvae_lightning.inference.loading import find_checkpoint
from nvae_lightning.inference.recalibration import cached_recalibration
from nvae_lightning.inference.sampling import Settings
from nvae_lightning.model import NVAE
from nvae_lightning.utilities.files import whole_file
from nvae_lightning.utilities.images import as_bytes, grid

_KINDS = {
    "num_samples": int,
    "temperature": float | list[float],
    "recalibrate_bn": bool,
    "recalibration.num_passes": int,
    "recalibration.batch_size": int,
    "batch_size": int,
    "compile": bool,
    "images": str | None,
}
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # weights and distributions have 32 bits


def load_images(config: DictConfig, model: NVAE, count: int) -> Tensor:
    """Load images for the model to begin with: the first of ``images``, or some of the test split.

    Raises:
        ValueError: If there are not so many.
    """
    if config.images is not None:
        datamodule: ImageDataModule = images_for(config, model, config.images)
    else:
        datamodule = training_data(config, model)
    datamodule.prepare_data()
    datamodule.setup("test")
    available = len(datamodule.test_set)
    if available < count:
        raise ValueError(
            f"num_samples: {count} images are needed, but there are only {available}; set a "
            "smaller num_samples"
        )
    # Those of a split may be sorted by class, those of a user are in the order meant.
    step = 1 if config.images is not None else available // count
    batch = datamodule.test_set.__getitems__([step * index for index in range(count)])
    return datamodule.to_input(batch, train=False)


def statistics(
    config: DictConfig, model: NVAE, temperature: float | list[float], folder: Path
) -> Mapping[str, Tensor]:
    """Measure the statistics of batch normalisation, or read them from beside the checkpoint."""
    source = find_checkpoint(config.ckpt_path)
    local = Path(config.ckpt_path).expanduser()
    if source is not None:
        folder = source.parent
    elif local.is_dir():
        folder = local
    return cached_recalibration(
        model,
        folder,
        "model" if source is None else source.stem,
        temperature,
        num_passes=config.recalibration.num_passes,
        batch_size=config.recalibration.batch_size,
        seed=config.seed,
    )


@command("sample")
def main(config: DictConfig) -> None:
    """Draw one picture, and keep its images as an array."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    keep_freed_memory()
    hide_warnings()
    check_settings(config, _KINDS)
    check_types(config)
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
    settings = Settings(
        model,
        config.num_samples,
        temperature,
        load=lambda count: load_images(config, model, count).to(device),
        batch_size=config.batch_size,
        statistics=(lambda: statistics(config, model, temperature, run_dir))
        if config.recalibrate_bn
        else None,
    )
    with trainer.precision_plugin.forward_context():
        drawing = instantiate(config.mode)(settings)
    mode = HydraConfig.get().runtime.choices["mode"]
    picture, numbers = run_dir / f"{mode}.png", run_dir / f"{mode}.npz"
    with whole_file(picture) as partial:
        to_pil_image(grid(drawing.images, drawing.num_columns)).save(partial)
    pixels = as_bytes(drawing.images).permute(0, 2, 3, 1).cpu().numpy()
    with whole_file(numbers) as partial:
        np.savez_compressed(partial, images=pixels)
    print(f"{len(pixels)} images in '{picture}' and {numbers.name}")


if __name__ == "__main__":
    run(main)
