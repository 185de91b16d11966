"""Metrics monitored by callbacks and searches, with and without validation data."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule, Trainer
from omegaconf import OmegaConf

with warnings.catch_warnings():  # beartype's, of omegaconf's DictConfig
    warnings.simplefilter("ignore", DeprecationWarning)
    from nvae_lightning.cli import training_checks

BEST = {"best": {"monitor": "val/bpd"}, "guard": {"patience": 3}}
STOPPING = {"early_stopping": {"monitor": "val/bpd"}}


class Without(LightningDataModule):
    """Data module with training images only."""


class With(LightningDataModule):
    """Data module that also has validation images."""

    def val_dataloader(self) -> list[Any]:
        return [1]


def check(
    data: LightningDataModule, callbacks: Any, metric: str = "val/bpd", **trainer: Any
) -> None:
    quiet: dict[str, Any] = {"logger": False, "accelerator": "cpu", "devices": 1}
    config = OmegaConf.create({"optimized_metric": metric, "callbacks": callbacks})
    training_checks.check_loaders(config, data, Trainer(**quiet, **trainer))


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as a trial of a search."""
    monkeypatch.setattr(training_checks, "is_search", lambda: True)


@pytest.fixture(autouse=True)
def _no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_checks, "is_search", lambda: False)


def test_without_validation_data_the_best_checkpoint_is_allowed() -> None:
    check(Without(), BEST)
    check(Without(), None)
    check(Without(), {**BEST, "early_stopping": {"monitor": "train/bpd"}})


def test_without_validation_data_other_callbacks_are_refused() -> None:
    message = "^callbacks.early_stopping.monitor: got val/bpd, but .* dataset.validation_fraction"
    with pytest.raises(ValueError, match=message):
        check(Without(), {**BEST, **STOPPING})
    with pytest.raises(ValueError, match=message):
        check(With(), STOPPING, limit_val_batches=0)
    check(With(), {**BEST, **STOPPING})


@pytest.mark.usefixtures("search")
def test_without_validation_data_searches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^optimized_metric: got val/bpd, but .*fraction=0\.1"):
        check(Without(), BEST)
    check(Without(), BEST, "train/bpd")
    check(With(), BEST)


def test_test_metrics_are_not_optimised() -> None:
    with pytest.raises(ValueError, match=r"^optimized_metric: got test/bpd, but nothing"):
        check(With(), BEST, "test/bpd")
