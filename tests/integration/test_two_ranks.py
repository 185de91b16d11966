"""Two ranks together process the same images as one. As a script this file trains and tests."""

import json
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from nvae_lightning.data import Image as ImageFormat
from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.readers import ArraySource, Splits

NUM_TRAIN, GLOBAL_BATCH = 22, 4
EVEN, ODD = 11, 9  # test images: both ranks have three batches, or one has three and one two


class Numbered(ImageDataModule):
    """Every pixel of image i is i; the numbers of test images follow those of training images."""

    num_test = 0

    @cached_property
    def _sources(self) -> Splits:
        images = np.arange(NUM_TRAIN + self.num_test, dtype=np.uint8).repeat(16)
        images = images.reshape(-1, 4, 4, 1)
        test = images[NUM_TRAIN:]
        parts = {"train": images[:NUM_TRAIN], "validation": test, "test": test}
        return Splits("numbers", {name: ArraySource(part) for name, part in parts.items()})


class Recorder(LightningModule):
    """Record the images and their logged mean brightness."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.norm = nn.BatchNorm2d(1)  # the ranks share its statistics
        self.seen: list[list[int]] = []

    def _normalize(self, batch: Tensor) -> Tensor:
        self.seen.append((batch[:, 0, 0, 0] * 255).round().int().tolist())
        return self.norm(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self._normalize(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._normalize(batch)
        # Lightning 2.6 divides the sum of the sizes by the number of ranks and rounds down.
        weight = len(batch) * self.trainer.world_size
        self.log("mean", batch.double().mean() * 255, batch_size=weight, sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        self._write("train")

    def on_validation_end(self) -> None:
        self._write("validation")

    def on_test_end(self) -> None:
        self._write("test")

    def _write(self, stage: str) -> None:
        if self.seen:
            mean = self.trainer.callback_metrics.get("mean", torch.zeros(())).item()
            path = self.folder / f"{stage}.{self.global_rank}.json"
            path.write_text(json.dumps({"seen": self.seen, "mean": mean}))
            self.seen = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def main(folder: Path, num_ranks: int, num_test: int) -> None:
    """Train for one epoch, validate and test."""
    folder.mkdir()
    data = Numbered(batch_size=GLOBAL_BATCH // num_ranks, image=ImageFormat(1, 4, 8))
    data.num_test = num_test
    module = Recorder(folder)
    trainer = Trainer(
        accelerator="cpu", devices=num_ranks, strategy="ddp_fork" if num_ranks > 1 else "auto",
        max_epochs=1, default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)


@pytest.fixture(scope="module")
def folder(written_by_this_file: Path) -> Path:
    """Folder of the records of all runs, which run in a separate process."""
    return written_by_this_file


def written(folder: Path, num_ranks: int, num_test: int, stage: str) -> list[dict[str, Any]]:
    """Return the records of each rank in a stage."""
    place = folder / f"{num_ranks}-{num_test}"
    return [json.loads((place / f"{stage}.{r}.json").read_text()) for r in range(num_ranks)]


def test_two_ranks_train_on_the_same_images_per_step_as_one(folder: Path) -> None:
    (alone,) = written(folder, 1, EVEN, "train")
    together = written(folder, 2, EVEN, "train")
    steps = zip(*(rank["seen"] for rank in together), strict=True)
    shared = [sorted(number for batch in batches for number in batch) for batches in steps]
    assert shared == [sorted(batch) for batch in alone["seen"]]
    assert len(shared) == NUM_TRAIN // GLOBAL_BATCH


@pytest.mark.parametrize("stage", ["validation", "test"])
@pytest.mark.parametrize("num_test", [EVEN, ODD])
def test_two_ranks_evaluate_every_image_once_and_log_the_same_mean_as_one(
    folder: Path, num_test: int, stage: str
) -> None:
    together = written(folder, 2, num_test, stage)
    seen = [number for rank in together for batch in rank["seen"] for number in batch]
    assert sorted(seen) == list(range(NUM_TRAIN, NUM_TRAIN + num_test))
    for rank in (*together, *written(folder, 1, num_test, stage)):
        assert rank["mean"] == pytest.approx(NUM_TRAIN + (num_test - 1) / 2, rel=1e-6)


if __name__ == "__main__":
    for ranks in (2, 1):
        for images in (EVEN, ODD):
            main(Path(sys.argv[1]) / f"{ranks}-{images}", ranks, images)
