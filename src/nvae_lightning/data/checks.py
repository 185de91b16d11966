"""Errors that name the setting they are about."""

import os
from collections.abc import Container, Iterator
from contextlib import contextmanager


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Say which setting an error is about, unless it does."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("dataset."):
            raise
        raise ValueError(f"{setting}: {error}") from error


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
