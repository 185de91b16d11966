"""Checkpoint to resume from, and reading and writing of checkpoints for Lightning."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from nvae_lightning.inference.loading import find_checkpoint
from nvae_lightning.serialization.checkpoints import BEST, last_checkpoint, read_checkpoint
from nvae_lightning.utilities.files import whole_file


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
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

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


def checkpoint_to_resume(path: str | None, folder: Path) -> Path | None:
    """Return the intact checkpoint to resume from; None for a new training.

    Args:
        path: The setting `ckpt_path`; under torchrun, ``last`` also starts a run.
        folder: Folder of this run's own checkpoints.

    Raises:
        ValueError: If the checkpoint is missing or damaged.
    """
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    found = last_checkpoint(folder) if path == "last" or requeued else None
    # torchrun repeats its command line when it restarts the ranks.
    is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if found is not None or path is None or (path == "last" and is_torchrun):
        return found
    source = folder / BEST if path == "best" else Path(path).expanduser().absolute()
    if path == "last" or (path == "best" and not source.exists()):
        raise ValueError(
            f"ckpt_path={path}: no intact checkpoint in '{folder}'; "
            "name the folder of the run to resume as hydra.run.dir=FOLDER"
        )
    if source.is_dir():
        try:
            found = find_checkpoint(source)
        except ValueError as error:
            raise ValueError(f"ckpt_path: {error}") from error
        if found is None:
            raise ValueError(
                f"ckpt_path: '{path}' holds weights without the state of a training; give the "
                "folder of a run, or one of its checkpoints"
            )
        return found
    read_checkpoint(source)
    return source
