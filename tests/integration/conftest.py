"""Fixtures that compose configs, build their models and run commands in separate processes."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from warm_python import run_python

from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.model import NVAE

Compose = Callable[..., DictConfig]
Run = Callable[..., subprocess.CompletedProcess[str]]

_BUILT: dict[str, NVAE] = {}


def build_on_meta(model: Any) -> NVAE:
    """Build a config's model on the meta device, once per session: many configs share one."""
    description = OmegaConf.to_yaml(model, resolve=True)
    if description not in _BUILT:
        with torch.device("meta"):
            _BUILT[description] = instantiate(model, _convert_="all")
    return _BUILT[description]


@pytest.fixture
def compose_config() -> Iterator[Compose]:
    """Compose train.yaml with overrides."""
    with initialize_config_dir(str(CONFIG_ROOT / "conf"), version_base="1.3"):
        yield lambda *overrides: compose("train", list(overrides))


@pytest.fixture
def run_train(tmp_path: Path) -> Run:
    """Run the training command in an empty folder."""

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
        return run_python("-m", "nvae_lightning.train", *overrides, cwd=tmp_path, env=environment)

    return run
