"""NVAEModule in Lightning's own Trainer: its settings, callbacks and loggers, and its seeds."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from nvae_lightning.model import NVAE
from nvae_lightning.serialization.checkpoints import BEST, last_checkpoint, step_of
from nvae_lightning.training import NVAEModule
from nvae_lightning.training.callbacks import Checkpoint, Guard, Resumption
from nvae_lightning.training.checkpoints import AtomicCheckpointIO

BuildNVAE = Callable[..., NVAE]
MONITOR = "val/bpd"


class Images(LightningDataModule):
    """Three batches of uint8 training images and one validation batch."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (12, 3, 8, 8), generator=generator, dtype=torch.uint8)
        self.noise: list[Tensor] = []

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.images, batch_size=4, shuffle=True)  # pyright: ignore

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.images[:4], batch_size=4)  # pyright: ignore

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        self.noise.append(torch.rand(1))  # like a random flip
        return batch.float() / 255


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": bool(callbacks), "max_epochs": 3}
    return Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        num_sanity_val_steps=0, plugins=[AtomicCheckpointIO()], **{**quiet, **settings},
    )  # fmt: skip


def best(folder: Path) -> ModelCheckpoint:
    """Return the checkpoint callback of conf/callbacks/best.yaml."""
    return ModelCheckpoint(
        folder, filename="best", monitor=MONITOR, mode="min", save_top_k=1,
        auto_insert_metric_name=False, save_on_train_epoch_end=False, enable_version_counter=False,
    )  # fmt: skip


class Bpd(Callback):
    """Record the bits per dim of validations."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.values.append(float(trainer.callback_metrics[MONITOR]))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_ten_lines_train_a_model_and_load_it(build_nvae: BuildNVAE, tmp_path: Path) -> None:
    module = NVAEModule(build_nvae())
    plain = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False)
    plain.fit(module, DataLoader(Images().images.float() / 255, batch_size=4))  # pyright: ignore
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    loaded = NVAEModule.load_from_checkpoint(path)
    for before, after in zip(module.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(before, after)


def test_the_loss_requires_no_trainer(build_nvae: BuildNVAE) -> None:
    module = NVAEModule(build_nvae())
    x = Images().images.float() / 255
    torch.manual_seed(1)
    found = module.loss(x)
    bound = (found.distortion + found.rate.sum(0)).mean()
    assert found.loss.item() == pytest.approx(bound.item())
    found.loss.backward()
    penalties = {name: value.item() for name, value in module.penalties().items()}
    assert penalties.keys() == {"spectral", "bn_scale"}
    torch.manual_seed(1)
    heavier = module.loss(x, penalty_weight=0.5).loss
    assert heavier.item() > found.loss.item() + 0.4 * sum(penalties.values())


def test_seed_everything_determines_all_random_numbers(
    build_nvae: BuildNVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = build_nvae().state_dict()
    runs = []
    for seed in (1, 1, 2):
        monkeypatch.setenv("PL_GLOBAL_SEED", "")  # restored at the end
        model, data = build_nvae(), Images()
        model.load_state_dict(state)
        seed_everything(seed, verbose=False)
        # The data module's own hook does not disable the seeding.
        trainer(tmp_path, max_epochs=1).fit(NVAEModule(model), data)
        runs.append((torch.cat(data.noise), next(model.parameters()).detach()))
    assert len(runs[0][0].unique()) == 4  # three batches and a validation
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])


@pytest.mark.filterwarnings("ignore:Images does not save its place in an epoch")
def test_fast_dev_run_takes_one_step_and_writes_nothing(
    build_nvae: BuildNVAE, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    callbacks = (
        Checkpoint(str(folder)),
        best(folder),
        EarlyStopping(MONITOR),
        Resumption(),
        Guard(),
    )
    plain = trainer(tmp_path, *callbacks, fast_dev_run=True)
    plain.fit(NVAEModule(build_nvae()), Images())
    assert plain.global_step == 1
    assert list(tmp_path.iterdir()) == []


class Watch(Callback):
    """Record the batches and gradients of training steps."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.gradient_norm = 0.0
        self.is_anomaly_detected = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        self.is_anomaly_detected = torch.is_anomaly_enabled()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.gradient_norm = float(torch.nn.utils.get_total_norm(gradients))


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled")
def test_settings_of_the_trainer_work_as_in_lightning(
    build_nvae: BuildNVAE, tmp_path: Path
) -> None:
    watch = Watch()
    plain = trainer(
        tmp_path, watch, overfit_batches=1, gradient_clip_val=1e-3, detect_anomaly=True,
        profiler="simple", logger=CSVLogger(tmp_path, "", ""), enable_checkpointing=False,
    )  # fmt: skip
    plain.fit(NVAEModule(build_nvae()), Images())
    assert plain.global_step == len(watch.batches) == 3
    assert all(torch.equal(batch, watch.batches[0]) for batch in watch.batches)
    assert watch.gradient_norm == pytest.approx(1e-3, rel=1e-3)
    assert watch.is_anomaly_detected
    assert plain.profiler.recorded_durations["run_training_batch"]  # pyright: ignore
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"train/bpd", "val/bpd", "train/grad_norm", "val/kl_group/02"} <= rows[0].keys()
    plain = trainer(tmp_path, limit_train_batches=2, limit_val_batches=0, max_epochs=1)
    plain.fit(NVAEModule(build_nvae()), Images())
    assert plain.global_step == 2
    assert not any(name.startswith("val/") for name in plain.callback_metrics)


@pytest.mark.filterwarnings("ignore:.*does not save its place in an epoch")
def test_best_checkpoint_and_early_stopping_resume(build_nvae: BuildNVAE, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def fit(max_epochs: int, path: Path | None = None) -> tuple[Trainer, list[float]]:
        torch.manual_seed(1)
        bpd = Bpd()
        stopping = EarlyStopping(MONITOR, patience=9)
        saving = Checkpoint(str(folder), every_n_train_steps=1, keep=99)
        # The order does not matter.
        plain = trainer(
            tmp_path, best(folder), bpd, stopping, saving, Resumption(), Guard(),
            max_epochs=max_epochs,
        )  # fmt: skip
        plain.fit(NVAEModule(build_nvae()), Images(), ckpt_path=path, weights_only=True)
        return plain, bpd.values

    whole, bpds = fit(6)
    assert len(bpds) == 6
    lowest = min(range(6), key=bpds.__getitem__)
    assert step_of(folder / BEST) == 3 * (lowest + 1)
    assert last_checkpoint(folder) == folder / "step0000018.ckpt"
    whole_stopping: Any = whole.early_stopping_callback
    guard = next(c for c in whole.callbacks if isinstance(c, Guard))  # pyright: ignore
    assert guard._last_good(whole) == str(folder / "step0000018.ckpt")
    torch.manual_seed(2)
    resumed, later = fit(6, folder / "step0000009.ckpt")
    assert later == bpds[3:]
    stopping: Any = resumed.early_stopping_callback
    assert stopping.state_dict().keys() == whole_stopping.state_dict().keys()
    assert stopping.wait_count == whole_stopping.wait_count
    assert stopping.best_score == whole_stopping.best_score == pytest.approx(min(bpds))
    assert step_of(folder / BEST) == 3 * (lowest + 1)
    # Also resume from the best checkpoint.
    again, rest = fit(6, folder / BEST)
    assert rest == bpds[lowest + 1 :]
    assert again.global_step == 18
