"""Samples at several temperatures, and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from nvae_lightning.data import Image as ImageFormat
from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.readers import ArraySource, Splits
from nvae_lightning.model import NVAE
from nvae_lightning.objective import KL, Penalty, constant
from nvae_lightning.training.callbacks import PeakMemory, Temperatures
from nvae_lightning.training.module import NVAEModule
from nvae_lightning.utilities import figures

BATCH = 4
Measure = Callable[..., dict[str, float]]


class Noise(ImageDataModule):
    """Random colour images."""

    @cached_property
    def _sources(self) -> Splits:
        images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
        return Splits("noise", {"train": ArraySource(images), "test": ArraySource(images[:4])})


@pytest.fixture
def module(build_nvae: Callable[..., NVAE]) -> NVAEModule:
    """A tiny module."""
    return NVAEModule(
        build_nvae(),
        kl=KL(beta=constant, size_factor=None),
        penalty=Penalty(weight=0.01),
        optimizer=partial(torch.optim.Adamax, lr=1e-3, eps=1e-3),
        final_learning_rate=1e-3,
        warmup_epochs=0,
        num_importance_samples=1,
    )


@pytest.fixture
def measure(module: NVAEModule, tmp_path: Path) -> Measure:
    """Train for a few steps and test with callbacks; return what was logged."""

    def run(*callbacks: Callback, batch_size: int = BATCH, **settings: Any) -> dict[str, float]:
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=4, log_every_n_steps=1, logger=False,
            callbacks=list(callbacks), default_root_dir=tmp_path, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0,
            **settings,
        )  # fmt: skip
        data = Noise(batch_size=batch_size, image=ImageFormat(3, 8, 8))
        trainer.fit(module, data)
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        trainer.test(module, data, verbose=False)
        return found | {name: float(value) for name, value in trainer.callback_metrics.items()}

    return run


def _statistics(model: NVAE) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def test_a_row_per_temperature_of_the_same_noise(
    module: NVAEModule, measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Tensor, list[str]]] = []
    draw = figures.rows_of_images

    def keep(rows: Tensor, labels: list[str]) -> Any:
        drawn.append((rows, labels))
        return draw(rows, labels)

    monkeypatch.setattr(figures, "rows_of_images", keep)
    before: list[dict[str, Tensor]] = []

    class Before(Callback):
        def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            before.append(_statistics(module.model))

    measure(Before(), Temperatures([0.0, 0.5, 0.5], num_images=3, num_passes=2, batch_size=2))
    ((rows, labels),) = drawn
    assert labels == ["t = 0", "t = 0.5", "t = 0.5"]
    assert rows.shape == (3, 3, 3, 8, 8)
    # At temperature 0 all samples are equal; two rows of one temperature are equal.
    assert torch.allclose(rows[0], rows[0, :1].expand_as(rows[0]), atol=1e-6)
    assert not torch.allclose(rows[1, 0], rows[1, 1], atol=1e-6)
    assert torch.equal(rows[1], rows[2])
    assert (tmp_path / "temperatures.png").stat().st_size > 1000
    # Neither statistics nor random numbers of the model itself have changed.
    for name, value in _statistics(module.model).items():
        assert torch.equal(value, before[0][name]), name


def test_measurements_do_not_change_random_numbers(measure: Measure) -> None:
    states = []
    for callbacks in ([], [Temperatures([0.7], num_images=1, num_passes=1)]):
        torch.manual_seed(0)
        measure(*callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_memory_includes_the_optimizer_state(module: NVAEModule, measure: Measure) -> None:
    kept = sum(value.nbytes for value in (*module.parameters(), *module.buffers()))
    weights = sum(parameter.nbytes for parameter in module.parameters())
    found = measure(PeakMemory())["train/peak_memory_gib"] * 2**30
    # Adamax keeps two numbers per weight; gradients and feature maps add to that.
    assert found > kept + 3 * weights


def test_memory_grows_with_the_batch_but_not_with_accumulation(measure: Measure) -> None:
    one = measure(PeakMemory())["train/peak_memory_gib"]
    accumulated = measure(PeakMemory(), accumulate_grad_batches=2)["train/peak_memory_gib"]
    larger = measure(PeakMemory(), batch_size=2 * BATCH)["train/peak_memory_gib"]
    assert accumulated == pytest.approx(one, rel=0.1)
    assert larger > 1.3 * one


def test_counting_memory_ends_with_an_exception(measure: Measure) -> None:
    class Fail(Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            if trainer.global_step == 1:
                raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        measure(PeakMemory(), Fail())
    assert _get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Temperatures([]), r"temperatures\.temperatures: got \[\]"),
        (lambda: Temperatures([1.0, -0.1]), "finite and not negative"),
        (
            lambda: Temperatures([0.7], num_images=0),
            r"temperatures\.num_images must be an integer",
        ),
        (
            lambda: Temperatures([0.7], num_passes=0),
            r"temperatures\.num_passes must be an integer of at least",
        ),
        (
            lambda: Temperatures([0.7], batch_size=0),
            r"temperatures\.batch_size must be an integer of at least",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(build: Callable[[], Callback], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
