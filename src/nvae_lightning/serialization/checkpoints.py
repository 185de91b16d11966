"""Reading of training checkpoints, without Lightning."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from nvae_lightning.utilities.archive import check_stored, damage, why_unreadable
from nvae_lightning.utilities.signals import is_first_rank

#: Name of the link to the latest checkpoint, and of the checkpoint with the best validation.
LAST, BEST = "last.ckpt", "best.ckpt"
_NAME = re.compile(r"step(\d+)\.ckpt")


def verify_checkpoint(path: Path) -> None:
    """Compare a checkpoint with its checksums.

    Raises:
        ValueError: If it is missing, truncated or changed.
    """
    try:
        damaged = damage(path)
    except FileNotFoundError as error:
        raise ValueError(f"ckpt_path: '{path}' does not exist; give a checkpoint file") from error
    if damaged is not None:
        raise ValueError(_damaged(path, damaged))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Verify a checkpoint and load it to the CPU.

    Raises:
        ValueError: If it is missing, damaged, or contains anything but tensors and plain values.
    """
    verify_checkpoint(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises many kinds
        raise ValueError(_damaged(path, why_unreadable(path, error))) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(
            f"ckpt_path: '{path}' is not the checkpoint of a training; give one that is"
        )
    return checkpoint


def step_of(path: Path) -> int:
    """Return the number of optimiser steps of a checkpoint; -1 if it is not readable.

    File times are unreliable: clocks are set back, and a copy is newer than its original.
    """
    if named := _NAME.fullmatch(path.name):
        return int(named[1])
    try:
        check_stored(path)
        return int(
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        )
    except Exception:  # pickle raises many kinds
        return -1


def last_checkpoint(folder: Path) -> Path | None:
    """Return the intact checkpoint with the most steps; warn about later ones that are damaged."""
    paths = {path.resolve() for path in folder.glob("*.ckpt") if path.exists()}
    # Of several with the same step, prefer the one named after it.
    order = {path: (step_of(path), _NAME.fullmatch(path.name) is not None) for path in paths}
    for path in sorted(paths, key=order.__getitem__, reverse=True):
        try:
            verify_checkpoint(path)
        except ValueError as error:
            if is_first_rank():
                warnings.warn(f"{error}; an older one is used", stacklevel=2)
            continue
        return path
    return None


def _damaged(path: Path, reason: object) -> str:
    reason = " ".join(str(reason).split())
    return (
        f"ckpt_path: '{path}' is damaged or not a checkpoint ({reason}); give another one, or last"
    )
