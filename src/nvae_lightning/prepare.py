"""Prepare a dataset: ``python -m nvae_lightning.prepare dataset=… source=…``."""

from __future__ import annotations

from omegaconf import DictConfig

from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.setting_types import build_datamodule
from nvae_lightning.data.summary import REPORT, merged


@command("prepare")
def main(config: DictConfig) -> None:
    """Write a dataset as memory-mapped arrays and print a summary of its images."""
    if config.on_error not in ("stop", "skip"):
        raise ValueError(f"on_error: got {config.on_error!r}, but it must be stop or skip")
    datamodule = build_datamodule(config, ours=True)
    splits = datamodule.prepare(
        str(config.source), skip_errors=config.on_error == "skip", overwrite=config.overwrite
    )
    for split, known in splits.items():
        count, height, width, channels = known.shape
        print(f"{split:10}  {count:,} images of {height}x{width}x{channels}")
    print(f"from {next(iter(splits.values())).format}, in '{datamodule.folder}'")
    for line in merged(known.summary for known in splits.values()).lines():
        print(line)
    print(f"images converted and files not read: '{datamodule.folder / REPORT}'")


if __name__ == "__main__":
    run(main)
