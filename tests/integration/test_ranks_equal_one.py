"""Two ranks with half a batch each train like one with the whole batch. Also a script."""

import sys
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from omegaconf import OmegaConf
from torch import Tensor, nn

from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.data import Image as ImageFormat
from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.readers import ArraySource, Splits
from nvae_lightning.model import (
    NVAE,
    DepthwiseCell,
    DiscretizedLogisticMixtureLikelihood,
    Hierarchy,
    Image,
    Inference,
    RegularCell,
)
from nvae_lightning.model.layers import DataDependentConv2d
from nvae_lightning.objective import KL, Penalty, constant, size_factor
from nvae_lightning.training.callbacks import Checkpoint, Guard
from nvae_lightning.training.callbacks.guard import DivergedError
from nvae_lightning.training.module import NVAEModule

pytestmark = pytest.mark.slow

NUM_STEPS, GLOBAL_BATCH = 5, 4
WN_ELU = partial(
    RegularCell,
    normalization=nn.Identity,
    activation=nn.ELU,
    convolution=DataDependentConv2d,
)
CELLS = {
    "batch-norm": (RegularCell, partial(DepthwiseCell, expansion=2.0)),
    "weight-norm": (WN_ELU, WN_ELU),
}


class Noise(ImageDataModule):
    """Random colour images; the first pixel of image i is i."""

    @cached_property
    def _sources(self) -> Splits:
        count = NUM_STEPS * GLOBAL_BATCH
        images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        images[:, 0, 0, 0] = np.arange(count)
        return Splits("noise", {"train": ArraySource(images), "test": ArraySource(images[:4])})


class Module(NVAEModule):
    """Module whose noise depends only on the image and the step."""

    def _noise(self, number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1000 * number + self.global_step)
        shapes = self.model.latent_shapes
        return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    def _infer(self, x: Tensor) -> Inference:
        numbers = (x[:, 0, 0, 0] * 255).round().int().tolist()
        noise = zip(*(self._noise(number) for number in numbers), strict=True)
        return self.model(x, [torch.stack(group) for group in noise])


class Recorder(Callback):
    """Record losses, gradients and the final state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[Tensor] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        guard = next(c for c in trainer.callbacks if isinstance(c, Guard))  # pyright: ignore
        written = {
            "losses": self.losses, "gradients": self.gradients, "state": pl_module.state_dict(),
            "guard": guard.state_dict(),
        }  # fmt: skip
        torch.save(written, self.folder / f"{trainer.global_rank}.pt")


class WritingGuard(Guard):
    """Record why the training ends, and wait until the other rank has, too.

    The parent process kills the other ranks once one has exited.
    """

    folder: Path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        try:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        except DivergedError as error:
            (self.folder / f"{trainer.global_rank}.error").write_text(str(error))
            deadline = time.monotonic() + 60
            while len(list(self.folder.glob("*.error"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            raise


class BadGradient(Callback):
    """Put a NaN into a gradient of the second rank only, after the average over ranks."""

    def __init__(self, bad: Callable[[int], bool]) -> None:
        self.bad = bad

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_rank == 1 and self.bad(trainer.global_step):
            pl_module.model.encoder.stem.weight.grad.fill_(torch.nan)


def train(folder: Path, num_ranks: int, cells: str, *callbacks: Callback) -> None:
    """Train for one epoch."""
    folder.mkdir()
    torch.manual_seed(0)
    encoder_cell, decoder_cell = CELLS[cells]
    model = NVAE(
        Image(channels=3, size=8, bits=8),
        Hierarchy.doubling(channels=4, num_groups=[1, 2], downsample=2, latent_channels=2),
        encoder_cell=encoder_cell, decoder_cell=decoder_cell,
        preprocess_cell=encoder_cell, postprocess_cell=decoder_cell,
        likelihood=partial(DiscretizedLogisticMixtureLikelihood, num_mixtures=2),
        num_encoder_cells=1, num_decoder_cells=1, num_preprocess_cells=1,
        num_postprocess_cells=1, num_flows=1,
    )  # fmt: skip
    optimizer = OmegaConf.load(CONFIG_ROOT / "conf" / "optimizer" / "adamax.yaml")
    module = Module(
        model,
        kl=KL(beta=partial(constant, value=0.5), size_factor=size_factor),
        penalty=Penalty(weight=0.1),
        optimizer=instantiate(OmegaConf.merge(optimizer, {"lr": 1e-2}), _convert_="all"),
        final_learning_rate=1e-4,
        warmup_epochs=0,
    )
    guard = WritingGuard(patience=2, max_rollbacks=1)
    guard.folder = folder
    checkpoint = Checkpoint(str(folder), every_n_train_steps=1, keep=9)
    trainer = Trainer(
        accelerator="cpu", devices=num_ranks, strategy="ddp_fork" if num_ranks > 1 else "auto",
        max_epochs=1, precision="64-true", logger=False, default_root_dir=folder,
        callbacks=[*callbacks, guard, Recorder(folder), checkpoint], enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, log_every_n_steps=1,
    )  # fmt: skip
    data = Noise(
        batch_size=GLOBAL_BATCH // num_ranks, image=ImageFormat(3, 8, 8), validation_fraction=0
    )
    trainer.fit(module, data)


@pytest.fixture(scope="module")
def folder(written_by_this_file: Path) -> Path:
    """Folder of the records of all runs, which run in a separate process."""
    return written_by_this_file


def written(folder: Path, name: str, num_ranks: int) -> list[dict[str, Any]]:
    """Return the records of each rank."""
    return [torch.load(folder / name / f"{rank}.pt") for rank in range(num_ranks)]


@pytest.mark.parametrize("cells", CELLS)
def test_two_ranks_with_half_the_batch_each_equal_one(folder: Path, cells: str) -> None:
    (alone,) = written(folder, f"{cells}-1", 1)
    together = written(folder, f"{cells}-2", 2)
    close: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
    losses = torch.stack([torch.stack(rank["losses"]) for rank in together])
    assert losses.shape == (2, NUM_STEPS)
    assert (losses[0] - losses[1]).abs().min() > 1e-3  # they see different images
    torch.testing.assert_close(losses.mean(0), torch.stack(alone["losses"]), **close)
    has = {
        kind: any(kind in name for name in alone["state"])
        for kind in ("running_mean", "running_var", "spectral_penalty.left_")
    }
    assert all(has.values()) == (cells == "batch-norm")
    assert has["spectral_penalty.left_"]
    for rank in together:
        torch.testing.assert_close(rank["gradients"], alone["gradients"], **close)
        assert rank["state"].keys() == alone["state"].keys()
        for name, value in alone["state"].items():
            torch.testing.assert_close(rank["state"][name], value, **close, msg=name)


def test_a_nan_on_one_rank_skips_the_step_on_both(folder: Path) -> None:
    first, second = written(folder, "skip", 2)
    (alone,) = written(folder, "batch-norm-1", 1)
    assert first["guard"]["num_skipped"] == second["guard"]["num_skipped"] == 2
    assert first["guard"]["num_rollbacks"] == second["guard"]["num_rollbacks"] == 1
    torch.testing.assert_close(first["state"], second["state"], rtol=0.0, atol=0.0)
    weight = "model.encoder.stem.weight"
    assert first["state"][weight].isfinite().all()
    assert not torch.equal(first["state"][weight], alone["state"][weight])


def test_a_persistent_nan_on_one_rank_ends_both(folder: Path) -> None:
    for rank in range(2):
        error = (folder / "diverge" / f"{rank}.error").read_text()
        assert error.startswith("the training has diverged")
        assert "gradient of model.encoder.stem.weight" in error  # not seen by rank 0


def main(folder: Path) -> None:
    """Run all trainings."""
    for cells in CELLS:
        for num_ranks in (2, 1):
            train(folder / f"{cells}-{num_ranks}", num_ranks, cells)
    train(folder / "skip", 2, "batch-norm", BadGradient(lambda step: step in (2, 3)))
    try:
        train(folder / "diverge", 2, "batch-norm", BadGradient(lambda step: step > 0))
    except torch.multiprocessing.ProcessRaisedException:  # pyright: ignore
        print("ended, as expected")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
