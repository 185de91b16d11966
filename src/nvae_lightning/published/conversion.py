"""Conversion of published checkpoints to folders of ``save_pretrained``."""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from nvae_lightning.model import NVAE
from nvae_lightning.objective import SpectralPenalty
from nvae_lightning.published.checkpoint import load_published
from nvae_lightning.serialization.architecture import ARCHITECTURE


def convert_published(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    lightning_checkpoint: bool = False,
    allow_nonfinite: bool = False,
) -> NVAE:
    """Convert a published checkpoint to a folder for :meth:`NVAE.from_pretrained`.

    Args:
        path: Checkpoint file.
        folder: New or empty folder; all files appear in it atomically.
        lightning_checkpoint: Whether to add ``last.ckpt`` to start a training from, with the
            published weights and a new optimiser, at step 0.
        allow_nonfinite: Whether weights may be NaN or infinite.

    Returns:
        The model.

    Raises:
        ValueError: If the folder is not empty, or the checkpoint cannot be read.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ValueError(f"'{folder}' exists and is not empty: name another folder")
    model = load_published(path, allow_nonfinite=allow_nonfinite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        files = Path(temporary) / "files"
        model.save_pretrained(files)
        if lightning_checkpoint:
            torch.save(_lightning_checkpoint(model), files / "last.ckpt")
        if folder.exists():
            folder.rmdir()
        files.rename(folder)
    return model


def _lightning_checkpoint(model: NVAE) -> dict[str, object]:
    modules = {"model": model, "spectral_penalty": SpectralPenalty(model)}
    return {
        "pytorch-lightning_version": version("lightning"),
        ARCHITECTURE: model.architecture,
        "epoch": 0,
        "global_step": 0,
        "state_dict": {
            f"{prefix}.{name}": value
            for prefix, module in modules.items()
            for name, value in module.state_dict().items()
        },
        "optimizer_states": [],
        "lr_schedulers": [],
    }
