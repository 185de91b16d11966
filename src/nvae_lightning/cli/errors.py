"""Errors of a user's settings, and of the system, as one line."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import ContextDecorator
from types import TracebackType

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from nvae_lightning.cli.command_line import describe_grammar
from nvae_lightning.cli.system_errors import describe_system_error
from nvae_lightning.training.divergence import DivergedError
from nvae_lightning.utilities.signals import Interrupted, tell

# As the user has set it: run() sets it, too.
_SHOW_TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"


class one_line_errors(ContextDecorator):
    """Turn errors of a user's settings, and of the system, into one line and exit status 1.

    In a sweep they end the job alone, and the sweep when all jobs have ended.
    ``HYDRA_FULL_ERROR=1`` shows the traceback instead. It holds nothing, so that launchers can
    pickle what it decorates.
    """

    def __enter__(self) -> None:
        """Do nothing yet."""

    def __exit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End with one line if the error is a user's, or a signal."""
        if isinstance(error, Interrupted | KeyboardInterrupt):
            signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
            tell(signum)
            sys.exit(128 + signum)
        expected = (
            ValueError,
            DivergedError,
            HydraException,
            MisconfigurationException,
            OmegaConfBaseException,
        )
        if error is None or _SHOW_TRACEBACKS:
            return
        if getattr(error, "is_told", False):
            sys.exit(1)
        describe = _describe if isinstance(error, expected) else describe_system_error
        if (message := describe(error, _run_dir(trace))) is None:
            return
        line = f"error: {message}"
        if len(getattr(tqdm, "_instances", ())):  # progress bars, which leave their line open
            print(file=sys.stderr)
        if not (HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN):
            sys.exit(line)
        # Hydra goes on with the other jobs and raises it again at the end. Until then the frames
        # that it has come through would keep the model in memory.
        print(f"job {HydraConfig.get().job.num}: {line}", file=sys.stderr, flush=True)
        setattr(error, "is_told", True)  # noqa: B010 -- exceptions have no such attribute
        traceback.clear_frames(trace)


def _describe(error: BaseException, run_dir: str | None) -> str:
    """Describe what the user did wrong, not how we came to notice."""
    if isinstance(error, OverrideParseException):
        return describe_grammar(error)
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
    # Hydra's error of a config that is not there is one of the system's, too.
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return place + str(describe_system_error(error, run_dir))
    if str(error) == "No trials are completed yet.":  # of Optuna, at the end of its sweep
        return "all trials of the sweep have failed, for which see failed.txt in its folder"
    message, _, _ = str(error).partition("Config search path:")
    message = " ".join(message.split())
    return place + message + _given(place.partition(":")[0], message)


def _run_dir(trace: TracebackType | None) -> str | None:
    """Return the folder of the run in which an error was raised; it may not be there."""
    if HydraConfig.initialized():
        runtime = HydraConfig.get().runtime
        return None if OmegaConf.is_missing(runtime, "output_dir") else runtime.output_dir
    # Hydra makes it before the command starts, and keeps no config if that fails.
    jobs = (f.f_locals for f, _ in traceback.walk_tb(trace) if f.f_code.co_name == "run_job")
    folder = next(jobs, {}).get("output_dir")
    return None if folder is None else os.path.abspath(folder)


def _given(key: str, message: str) -> str:
    """Quote what was given of a part, where its class has not said what it was given."""
    if not key or not HydraConfig.initialized():
        return ""
    given = []
    for override in HydraConfig.get().overrides.task:
        name, _, value = override.lstrip("+").partition("=")
        is_said = name.rpartition(".")[2] in message and value in message
        if (name == key or name.startswith(f"{key}.")) and not is_said:
            given.append(override)
    return f" (given: {' '.join(given)})" if given else ""
