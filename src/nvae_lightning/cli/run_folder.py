"""Lock the folder of a run, so that one process at a time writes to it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from nvae_lightning.utilities.signals import is_first_rank

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"

_held: dict[Path, int] = {}


def hold(folder: Path) -> None:
    """Create a folder and lock it until this process ends, however it ends.

    Raises:
        ValueError: If another process has locked it.
    """
    folder = folder.absolute()
    if folder in _held or not is_first_rank() or fcntl is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(
            f"hydra.run.dir: another run is writing to '{folder}'; wait until it has ended, or "
            "start this one with another hydra.run.dir=FOLDER"
        ) from error
    except OSError as error:
        os.close(descriptor)
        warnings.warn(
            f"'{folder}' cannot be locked ({error.strerror}): a second run there goes unnoticed",
            stacklevel=2,
        )
    else:
        _held[folder] = descriptor


def release() -> None:
    """Unlock all folders that this process has locked."""
    while _held:
        os.close(_held.popitem()[1])


if hasattr(os, "register_at_fork"):
    # A worker that outlives its killed parent for a moment would hold the lock.
    os.register_at_fork(after_in_child=release)
