"""Errors of settings and of the system, as one line."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from contextlib import ContextDecorator
from types import TracebackType

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from nvae_lightning.cli.overrides import how_to_write
from nvae_lightning.utilities.signals import Interrupted, tell

#: Errors of the system that a command cannot prevent: full disks, permissions and limits.
_SYSTEM_ERRORS = tuple(
    os.strerror(getattr(errno, name))
    for name in (
        "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENAMETOOLONG EMFILE ENFILE ENOMEM"
    ).split()
)

# As set by the user: run() also sets it.
_SHOW_TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"


class one_line_errors(ContextDecorator):
    """Turn errors of settings and of the system into one line and exit status 1.

    In a sweep they end the job, and the sweep once all jobs have ended. ``HYDRA_FULL_ERROR=1``
    shows the traceback instead. It has no state, so that launchers can pickle decorated functions.
    """

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Exit with one line after an expected error or a signal."""
        if isinstance(error, Interrupted | KeyboardInterrupt):
            signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
            tell(signum)
            sys.exit(128 + signum)
        if not isinstance(error, Exception) or _SHOW_TRACEBACKS:
            return
        if getattr(error, "is_printed", False):
            sys.exit(1)
        describe = _describe if isinstance(error, _expected()) else describe_system_error
        if (message := describe(error)) is None:
            return
        line = f"error: {message}"
        if len(getattr(tqdm, "_instances", ())):  # progress bars, whose last line is unfinished
            print(file=sys.stderr)
        if not (HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN):
            sys.exit(line)
        # Hydra runs the other jobs and raises the error again at the end. Until then its frames
        # would keep the model in memory.
        print(f"job {HydraConfig.get().job.num}: {line}", file=sys.stderr, flush=True)
        setattr(error, "is_printed", True)  # noqa: B010 -- exceptions have no such attribute
        traceback.clear_frames(trace)


def _expected() -> tuple[type[Exception], ...]:
    """List the errors of users; imports Lightning, which a command without errors may not need."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from nvae_lightning.training.callbacks.guard import DivergedError

    return (
        ValueError,
        DivergedError,
        HydraException,
        MisconfigurationException,
        OmegaConfBaseException,
    )


def _describe(error: BaseException) -> str:
    """Describe the cause of a user's error, after the setting concerned."""
    if isinstance(error, OverrideParseException):
        return how_to_write(error.override)
    if str(error) == "No trials are completed yet.":  # Optuna's, at the end of its sweep
        return "all trials of the search have failed"
    place = ""
    while isinstance(error, InstantiationException):
        # "Error in call to target 'x':\nValueError('...')\nfull_key: model.hierarchy"
        _, _, key = str(error).partition("full_key: ")
        place = f"{key.strip()}: " if key else place
        if error.__cause__ is None:
            break
        error = error.__cause__
    if str(error).startswith("Unable to configure handler") and error.__cause__ is not None:
        error = error.__cause__  # of a log file
    # Hydra's error about a missing config is also an OSError.
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return place + str(describe_system_error(error))
    message, _, _ = str(error).partition("Config search path:")
    message = " ".join(message.split())
    key = place.removesuffix(": ")
    is_named = message.startswith((place, f"{key}."))
    return ("" if is_named else place) + message + _given(key, message)


def describe_system_error(error: BaseException) -> str | None:
    """Describe an error of the system, or one that results from it; None for any other."""
    cause: BaseException | None = error
    while cause is not None:
        for line in _text(cause).splitlines():  # libraries in C++ or Rust keep only the text
            if any(text in line for text in _SYSTEM_ERRORS):
                return f"{line.strip()}; choose another path, or change its permissions or limits"
        cause = cause.__cause__ or cause.__context__
    return " ".join(_text(error).split()) if isinstance(error, OSError) else None


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot use '{error.filename}' ({error.strerror})"
    return str(error)


def _given(key: str, message: str) -> str:
    """Quote the overrides of a part whose own error does not name them."""
    if not key or not HydraConfig.initialized():
        return ""
    given = []
    for override in HydraConfig.get().overrides.task:
        name, _, value = override.lstrip("+").partition("=")
        is_said = name.rpartition(".")[2] in message and value in message
        if (name == key or name.startswith(f"{key}.")) and not is_said:
            given.append(override)
    return f" (given: {' '.join(given)})" if given else ""
