"""Restore damaged images: ``python -m nvae_lightning.restore ckpt_path=… images=… mask=FILE``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from nvae_lightning.cli.building import build_inference_trainer
from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.setting_types import check_type
from nvae_lightning.cli.trained import images_for, trained_model
from nvae_lightning.data.decode import Decoder, decode_file
from nvae_lightning.data.messages import naming
from nvae_lightning.utilities.files import whole_file
from nvae_lightning.utilities.images import as_pixels, write_grid


def load_mask(file: Path, size: int) -> Tensor:
    """Load whether pixels are known: those that are black in an image file.

    Raises:
        ValueError: If the file is missing, not an image, or black everywhere.
    """
    if not file.is_file():
        raise ValueError(f"mask: '{file}' is not a file; give an image, white where to fill in")
    decoder = Decoder(size, channels=1, interpolation="box", background="black")
    with naming("mask"):
        known = decode_file(file.read_bytes(), str(file), decoder)[0, 0] < 128
    if bool(known.all()):
        raise ValueError(f"mask: '{file}' is black everywhere; make it white where to fill in")
    return known


@command("restore")
def main(config: DictConfig) -> None:
    """Draw a row per image, and save completions and standard deviations as arrays."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    check_type("mask", config.mask, str)
    trainer = build_inference_trainer(config, run_dir, single=True)
    device = trainer.strategy.root_device
    model = trained_model(config).to(memory_format=torch.channels_last).to(device)
    known = load_mask(Path(config.mask).expanduser(), model.image.size).to(device)
    datamodule = images_for(config, model, "images")
    datamodule.prepare_data()
    datamodule.setup("test")
    restore = instantiate(config.task)
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)  # binarises the images
    rows, completions, deviations = [], [], []
    for index in range(len(datamodule.test_set)):
        batch = datamodule.test_set.__getitems__([index])
        x = datamodule.to_input(batch, train=False).to(device)
        with trainer.precision_plugin.forward_context():
            restored = restore(model, x, known, generator=generator)
        rows += [torch.where(known, x, 0.5), restored.images, restored.std[None]]
        completions.append(as_pixels(restored.images).numpy())
        deviations.append(restored.std.permute(1, 2, 0).cpu().numpy())
    picture, numbers = run_dir / "restored.png", run_dir / "restored.npz"
    write_grid(torch.cat(rows), len(completions[0]) + 2, picture)
    with whole_file(numbers) as file:
        np.savez_compressed(file, images=np.stack(completions), std=np.stack(deviations))
    print(f"{len(completions)} images in '{picture}' and {numbers.name}")


if __name__ == "__main__":
    run(main)
