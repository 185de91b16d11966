"""Errors that name the setting that they are about."""

import os
from collections.abc import Container, Iterator
from contextlib import contextmanager

from nvae_lightning.data.names import printable


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Put the name of a setting before errors that do not name one."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(("dataset.", "source: ")):
            raise
        raise ValueError(f"{setting}: {error}") from error
    except OSError as error:
        name = "" if error.filename is None else f" '{printable(str(error.filename))}'"
        if len(name) > 200:
            name = f"{name[:100]}...{name[-80:]}"
        raise ValueError(f"{setting}: cannot read{name} ({error.strerror or error})") from error


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_number(setting: str, value: int, allowed: Container[int], rule: str) -> None:
    """Check a whole number.

    Raises:
        ValueError: If it is not a whole number, or not among those allowed.
    """
    # `type` instead of isinstance, because True is an int.
    if type(value) is not int or value not in allowed:
        raise ValueError(
            f"{setting}: got {value!r}, but it must be {rule}; set {setting} accordingly"
        )
