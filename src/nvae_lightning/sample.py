"""Pictures from a trained model: ``python -m nvae_lightning.sample ckpt_path=… mode=…``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from nvae_lightning.backends import Compute
from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.machine import check_precision, keep_freed_memory
from nvae_lightning.cli.setting_types import check_seed, check_type, check_types
from nvae_lightning.cli.trained import images_for, trained_model, training_data
from nvae_lightning.data import ImageDataModule
from nvae_lightning.inference.loading import find_checkpoint
from nvae_lightning.inference.sampling import Settings, cached_recalibration
from nvae_lightning.model import NVAE
from nvae_lightning.utilities.files import whole_file
from nvae_lightning.utilities.images import as_bytes, grid

#: What layers are computed in, by Lightning's names. Weights and distributions have 32 bits.
_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


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
    """Draw one picture, and keep its images as numbers, too."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    keep_freed_memory()
    for name, value, kind in (
        ("num_samples", config.num_samples, int),
        ("recalibrate_bn", config.recalibrate_bn, bool),
        ("recalibration.num_passes", config.recalibration.num_passes, int),
        ("recalibration.batch_size", config.recalibration.batch_size, int),
        ("batch_size", config.batch_size, int),
        ("compile", config.compile, bool),
        ("images", config.images, str | None),
    ):
        check_type(name, value, kind)
    check_seed(config.seed)
    check_types(config)
    if config.precision not in _AUTOCAST:
        raise ValueError(
            f"precision: got {config.precision!r}, but samples are drawn in one of "
            f"{', '.join(_AUTOCAST)}; set precision accordingly"
        )
    temperature: Any = config.temperature
    if OmegaConf.is_config(temperature):
        temperature = OmegaConf.to_container(temperature)
    check_type("temperature", temperature, float | list[float])
    device = config.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = trained_model(config).to(memory_format=torch.channels_last)
    try:
        device = torch.device(device)
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's, of devices that are not there
        raise ValueError(
            f"device: got '{device}', which cannot be had ({str(error).splitlines()[0]}); set for "
            "example device=cpu"
        ) from error
    check_precision("precision", config.precision, device.type)
    Compute(compile=config.compile).apply(model)
    torch.manual_seed(config.seed)
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
    dtype = _AUTOCAST[config.precision]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
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
