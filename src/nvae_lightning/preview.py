"""Show a dataset as the model sees it: ``python -m nvae_lightning.preview dataset=…``."""

from __future__ import annotations

from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.setting_types import build_datamodule
from nvae_lightning.utilities import figures

NUM_IMAGES = 1000  # per split, for the histogram


@command("preview")
def main(config: DictConfig) -> None:
    """Check a dataset, print its counts, and draw some images and a histogram."""
    torch.manual_seed(config.seed)
    datamodule = build_datamodule(config, ours=True)
    datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.setup("test")
    image = datamodule.image
    sets = {
        "train": datamodule.train_set,
        "validation": datamodule.validation_set,
        "test": datamodule.test_set,
    }
    sets = {split: dataset for split, dataset in sets.items() if dataset is not None}
    pictures = {}
    for split, dataset in sets.items():
        # Spread over the split, which may be sorted by class.
        indices = torch.linspace(0, len(dataset) - 1, min(NUM_IMAGES, len(dataset))).long()
        indices = indices[torch.randperm(len(indices))]
        batch = dataset.__getitems__(indices.tolist())
        pictures[split] = image.pad(datamodule.to_input(batch, train=split == "train"))
    counts = {split: f"{len(dataset):,}" for split, dataset in sets.items()}
    _, channels, height, width = pictures["train"].shape
    name = HydraConfig.get().runtime.choices["dataset"]
    size = f"{height}x{width}x{channels}, {2**image.bits} levels ({image.bits} bits)"
    title = f"{name}: {size}\n" + ", ".join(f"{count} {split}" for split, count in counts.items())
    output = Path(config.output)
    figures.write(figures.dataset_overview(pictures, title, num_levels=2**image.bits), output)
    verified = "checksums verified" if datamodule.verify else "checksums not verified"
    print(title)
    print(f"prepared, {verified}" if datamodule.is_prepared else "decoded into memory", end=", ")
    print(f"picture in '{output}'")
    for line in datamodule.summary.lines():
        print(line)


if __name__ == "__main__":
    run(main)
