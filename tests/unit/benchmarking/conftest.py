"""Fixtures for a training with steps of a few milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from nvae_lightning.benchmarking import RandomImages, Training
from nvae_lightning.objective import KL, Penalty
from nvae_lightning.objective.schedules import constant
from nvae_lightning.training.module import NVAEModule
from nvae_lightning.utilities.image import Image as ImageFormat

BATCH = 4

Build = Callable[[], NVAEModule]


@pytest.fixture
def build_module(build_nvae: Any) -> Build:
    """Constructor of a module for 8x8 colour images."""
    return lambda: NVAEModule(
        build_nvae(),
        kl=KL(beta=partial(constant, value=1.0)),
        penalty=Penalty(weight=0.01),
        optimizer=partial(torch.optim.Adamax, lr=1e-3, eps=1e-3),
        final_learning_rate=1e-3,
        warmup_epochs=0,
    )


@pytest.fixture
def build_training(build_module: Build, tmp_path: Path) -> Callable[[], Training]:
    """Constructor of a training of that module."""

    def build() -> Training:
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=1000, logger=False, limit_val_batches=0,
            default_root_dir=tmp_path, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        images = RandomImages(num_batches=20, batch_size=BATCH, image=ImageFormat(3, 8, 8))
        return Training(trainer, build_module(), images)

    return build
