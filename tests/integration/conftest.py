"""Composing configs in the test's process, and running commands in one of their own."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from warm_python import run_python

from nvae_lightning.cli.config_root import CONFIG_ROOT

Compose = Callable[..., DictConfig]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def compose_config() -> Iterator[Compose]:
    """Compose train.yaml with overrides."""
    with initialize_config_dir(str(CONFIG_ROOT / "conf"), version_base="1.3"):
        yield lambda *overrides: compose("train", list(overrides))


@pytest.fixture
def run_train(tmp_path: Path) -> Run:
    """Run the training command in an empty folder, quietly and on one thread."""

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
        return run_python("-m", "nvae_lightning.train", *overrides, cwd=tmp_path, env=environment)

    return run
