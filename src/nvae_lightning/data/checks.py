"""Errors that name the setting they are about."""

import multiprocessing
import os
import re
from collections.abc import Container, Iterator
from contextlib import contextmanager

from nvae_lightning.data.names import printable

# What torch says of it, also from within a worker.
_SHARED_MEMORY = re.compile(r"shared memory|shm|Bus error|received 0 items of ancdata")


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Say which setting an error is about, unless it does."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(("dataset.", "source: ")):
            raise
        raise ValueError(f"{setting}: {error}") from error
    except OSError as error:
        name = "" if error.filename is None else f" '{_shortened(printable(str(error.filename)))}'"
        raise ValueError(f"{setting}: cannot read{name} ({error.strerror or error})") from error


def _shortened(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:100]}...{path[-80:]}"


@contextmanager
def needing_workers(num_workers: int) -> Iterator[None]:
    """Explain where worker processes cannot be started, or cannot hand over what they read.

    Raises:
        ValueError: If the system lacks the shared memory that they need.
    """
    try:
        if num_workers > 0:
            multiprocessing.Lock()  # what fails first, and in a DataLoader not in one line
        yield
    except (OSError, RuntimeError) as error:
        is_start = isinstance(error, OSError) and not str(error).startswith("Caught ")
        if num_workers == 0 or not (is_start or _SHARED_MEMORY.search(str(error))):
            raise
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
        raise ValueError(
            f"dataset.num_workers: {num_workers} worker processes cannot share memory with this "
            f"one ({reason}); make /dev/shm writable and large enough, or set "
            "dataset.num_workers=0"
        ) from error


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # what this process may use, where the system says
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_number(setting: str, value: int, allowed: Container[int], rule: str) -> None:
    """Check a whole number.

    Raises:
        ValueError: If it is not among those allowed, or not a whole number.
    """
    # `type`, not isinstance: True is an int to Python, yet no number that anybody meant.
    if type(value) is not int or value not in allowed:
        raise ValueError(
            f"{setting}: got {value!r}, but it must be {rule}; set {setting} accordingly"
        )
