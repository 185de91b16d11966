"""Writing and reading of checkpoints by Lightning's trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from nvae_lightning.serialization.checkpoints import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replace a checkpoint atomically; load intact files of tensors and plain values only.

    The format is `torch.save`'s: a zip archive with a checksum per tensor.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: object | None = None,
    ) -> None:
        """Save a checkpoint; after an interruption or on a full disk the previous file remains.

        Raises:
            OSError: If the file is not writable.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint to the CPU, whatever device it was saved from.

        Raises:
            ValueError: If it is missing, damaged, or holds anything but tensors and plain values.
        """
        return read_checkpoint(Path(path))
