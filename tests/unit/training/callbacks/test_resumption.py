"""A resumed training has the weights and rows of an uninterrupted one."""

from __future__ import annotations

import csv
import itertools
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from nvae_lightning.data import Image as ImageFormat
from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.readers.base import Splits
from nvae_lightning.data.readers.torchvision_files import ArraySource
from nvae_lightning.inference.batches import SeededModule
from nvae_lightning.serialization.checkpoints import LATEST_WEIGHTS, last_checkpoint
from nvae_lightning.training.callbacks import EMA, Checkpoint, Preemption, Resumption, Throughput
from nvae_lightning.training.checkpoints import AtomicCheckpointIO
from nvae_lightning.training.csv_logger import ResumableCSVLogger
from nvae_lightning.utilities.signals import Interrupted

NUM_IMAGES = 22  # 5 steps of 4 images per epoch, or 3 with accumulated gradients
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Noise(ImageDataModule):
    """Random grey images."""

    @cached_property
    def _sources(self) -> Splits:
        images = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 4, 4, 1), dtype=np.uint8)
        return Splits("noise", {"train": ArraySource(images), "test": ArraySource(images[:6])})


class Line(SeededModule):
    """One layer with noisy input, so that random numbers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 1)

    def _loss(self, batch: Tensor) -> Tensor:
        return (self.layer(batch.flatten(1)) + torch.randn(len(batch), 1)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch), batch_size=len(batch))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        num_steps = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / num_steps / 2)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Killed(BaseException):
    """Simulated SIGKILL: later writes are ignored."""


class Moments:
    """Count the moments of a run and call a function at one of them."""

    def __init__(self, at: int | None, act: Callable[[], None]) -> None:
        self.names: list[str] = []
        self._at, self._act = at, act

    def pass_one(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) - 1 == self._at:
            self._act()


HOOKS = (
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad",
    "on_before_optimizer_step", "on_train_batch_end", "on_validation_start",
    "on_validation_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end",
)  # fmt: skip


def watching(moments: Moments) -> Callback:
    """Build a callback in which every hook counts as a moment."""

    def hook(name: str) -> Callable[..., None]:
        return lambda self, *arguments, **settings: moments.pass_one(name)

    return type("Watching", (Callback,), {name: hook(name) for name in HOOKS})()


class Experiment:
    """One training, interrupted or not."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self._every = settings.pop("every_n_train_steps", 1000)
        self.settings = {"accumulate_grad_batches": 1, **settings}

    def run(
        self,
        at: int | None = None,
        signum: signal.Signals = signal.SIGKILL,
        *,
        batch_size: int = 4,
        callbacks: Iterable[Callback] = (),
    ) -> list[str]:
        """Train, from the last checkpoint if there is one; return the moments of the run."""
        kept = self.folder.with_name(f"{self.folder.name}-kept")

        def act() -> None:
            if signum != signal.SIGKILL:
                os.kill(os.getpid(), signum)
                return
            shutil.copytree(self.folder, kept, symlinks=True)
            raise Killed

        moments = Moments(at, act)

        class IO(AtomicCheckpointIO):
            def save_checkpoint(self, *arguments: Any, **settings: Any) -> None:
                moments.pass_one("before a checkpoint")
                super().save_checkpoint(*arguments, **settings)
                moments.pass_one("after a checkpoint")

        class Logger(ResumableCSVLogger):
            def log_metrics(self, *arguments: Any, **settings: Any) -> None:
                super().log_metrics(*arguments, **settings)
                moments.pass_one("after a row")

        checkpoint = last_checkpoint(self.folder / "checkpoints")
        if checkpoint is None and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        trainer = Trainer(
            accelerator="cpu", devices=1, log_every_n_steps=1, num_sanity_val_steps=0,
            logger=Logger(str(self.folder)), plugins=[IO()], enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=self.folder,
            callbacks=[
                watching(moments),
                Checkpoint(
                    str(self.folder / "checkpoints"), every_n_train_steps=self._every, keep=2
                ),
                Resumption(), *callbacks, LearningRateMonitor("step"), Preemption(),
                watching(moments),
            ],
            **self.settings,
        )  # fmt: skip
        data = Noise(batch_size=batch_size, image=ImageFormat(1, 4, 8))
        try:
            trainer.fit(Line(), data, ckpt_path=checkpoint, weights_only=True)
        except Killed:
            shutil.rmtree(self.folder)
            kept.rename(self.folder)
        except Interrupted:
            pass
        return moments.names

    def rows(self) -> list[dict[str, str]]:
        with (self.folder / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    def result(self) -> dict[str, Any]:
        found = torch.load(self.folder / "checkpoints" / "last.ckpt", weights_only=True)
        keys = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "loops")
        return {key: found[key] for key in keys}


SETTINGS = {
    "steps": {"max_steps": 10},
    "steps, within an epoch": {"max_steps": 8, "every_n_train_steps": 3},
    "steps, accumulated": {
        "max_steps": 6, "accumulate_grad_batches": 2, "every_n_train_steps": 1,
    },
    "epochs": {"max_epochs": 2, "max_steps": -1, "every_n_train_steps": 2},
    "epochs, accumulated": {
        "max_epochs": 2, "max_steps": -1, "accumulate_grad_batches": 2, "every_n_train_steps": 3,
    },
    "validation within an epoch": {"max_steps": 10, "val_check_interval": 2},
    "validation every other epoch": {
        "max_steps": 15, "check_val_every_n_epoch": 2, "every_n_train_steps": 5,
    },
}  # fmt: skip


@pytest.fixture(params=SETTINGS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SETTINGS[request.param]


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The 'train_dataloader' does not have many")
        yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def assert_same(whole: Experiment, other: Experiment, at: str) -> None:
    torch.testing.assert_close(
        other.result(), whole.result(), rtol=0, atol=0, msg=lambda text: f"{at}: {text}"
    )
    assert whole.rows() == other.rows(), at


def moments_of(names: list[str]) -> list[tuple[int, signal.Signals]]:
    """Return all moments with SIGKILL, and those with signal handlers with one of the signals."""
    signals = zip(range(taken_over(names), len(names)), itertools.cycle(SIGNALS), strict=False)
    return [(at, signal.SIGKILL) for at in range(len(names))] + list(signals)


def taken_over(names: list[str]) -> int:
    """Return the first moment at which the signal handlers are installed."""
    return names.index("on_train_start") + 2


def around_the_first_epoch_end(names: list[str]) -> list[tuple[int, signal.Signals]]:
    """Return moments at which a step may be counted twice or a validation be lost."""
    end = names.index("on_train_epoch_end")
    last_step = max(at for at in range(end) if names[at] == "on_train_batch_end")
    chosen = [last_step, (last_step + end) // 2, end, end + 2, names.index("on_train_epoch_end")]
    chosen.append(next(at for at in range(end, len(names)) if names[at] != "on_train_epoch_end"))
    signals = itertools.cycle((signal.SIGKILL, *SIGNALS))
    return list(zip(sorted({*chosen, last_step - 1}), signals, strict=False))


def compare_all(
    tmp_path: Path, chains: Iterable[list[tuple[int, signal.Signals]]], **settings: Any
) -> None:
    whole = Experiment(tmp_path / "whole", **settings)
    whole.run()
    for chain in chains:
        other = Experiment(tmp_path / "other", **settings)
        for at, signum in chain:
            other.run(at, signum)
        other.run()
        assert_same(whole, other, str([(at, n.name) for at, n in chain]))
        shutil.rmtree(other.folder)


def moments(tmp_path: Path, settings: dict[str, Any]) -> list[str]:
    return Experiment(tmp_path / "first", **settings).run()


def test_a_run_interrupted_around_the_end_of_an_epoch_resumes_exactly(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    chosen = around_the_first_epoch_end(moments(tmp_path, settings))
    compare_all(tmp_path, ([one] for one in chosen), **settings)


def test_a_run_interrupted_several_times_resumes_exactly(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    names, generator = moments(tmp_path, settings), random.Random(0)
    possible = range(taken_over(names), len(names) // 2)
    chains = [
        [
            (generator.choice(possible), generator.choice((signal.SIGKILL, *SIGNALS)))
            for _ in range(3)
        ]
        for _ in range(2)
    ]
    compare_all(tmp_path, chains, **settings)


@pytest.mark.slow
def test_a_run_interrupted_at_any_moment_resumes_exactly(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    chosen = moments_of(moments(tmp_path, settings))
    compare_all(tmp_path, ([one] for one in chosen), **settings)


def test_a_run_extended_within_an_epoch_completes_it_first(tmp_path: Path) -> None:
    def rows(*lengths: int) -> list[tuple[str, str, bool]]:
        experiment = Experiment(tmp_path / str(lengths), max_steps=0)
        for length in lengths:
            experiment.settings["max_steps"] = length
            experiment.run()
        return [(row["step"], row["epoch"], bool(row["val/loss"])) for row in experiment.rows()]

    assert rows(8, 13, 15) == rows(15)


def test_a_resume_with_another_batch_size_counts_every_step_once(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path / "run", max_steps=7, every_n_train_steps=1)
    experiment.run()
    for batch_size, num_steps in ((8, 9), (2, 20)):
        experiment.settings["max_steps"] = num_steps
        with pytest.warns(UserWarning, match="images per step, this run has"):
            experiment.run(batch_size=batch_size)
    steps = [int(row["step"]) for row in experiment.rows() if row["train/loss"]]
    assert steps == list(range(20))


def test_a_run_resumed_within_an_epoch_measures_its_own_time(tmp_path: Path) -> None:
    elapsed: list[float] = []

    class Watched(Throughput):
        def on_train_batch_end(self, *arguments: Any, **settings: Any) -> None:
            elapsed.append(time.perf_counter() - self._started)
            super().on_train_batch_end(*arguments, **settings)

    experiment = Experiment(tmp_path / "run", max_steps=3)
    for num_steps in (3, 5):
        experiment.settings["max_steps"] = num_steps
        experiment.run(callbacks=[Watched()])
    assert len(elapsed) == 5
    assert max(elapsed) < 60


@pytest.mark.parametrize("is_averaging", [True, False])
def test_a_resume_without_averaging_continues_with_the_latest_weights(is_averaging: bool) -> None:
    module = Line()
    trainer = Trainer(
        accelerator="cpu", callbacks=[EMA()] if is_averaging else [], logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.state.fn = TrainerFn.FITTING
    latest = {name: value + 1 for name, value in module.state_dict().items()}
    loaded = module.state_dict() if is_averaging else latest
    expected = {name: value.clone() for name, value in loaded.items()}
    Resumption().on_load_checkpoint(trainer, module, {LATEST_WEIGHTS: latest})
    torch.testing.assert_close(dict(module.state_dict()), expected)
