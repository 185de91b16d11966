"""Conversion of published checkpoints to folders of ``save_pretrained``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from nvae_lightning.model import NVAE
from nvae_lightning.published.checkpoint import load_published


def convert_published(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    allow_nonfinite: bool = False,
) -> NVAE:
    """Convert a published checkpoint to a folder for :meth:`NVAE.from_pretrained`.

    Args:
        path: Checkpoint file.
        folder: New or empty folder; all files appear in it atomically.
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
        if folder.exists():
            folder.rmdir()
        files.rename(folder)
    return model
