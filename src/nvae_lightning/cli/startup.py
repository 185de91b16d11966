"""What a command does before it imports anything."""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from types import TracebackType

from nvae_lightning.cli.system_errors import describe_system_error
from nvae_lightning.utilities.signals import take_over


def begin_command() -> None:
    """Prepare this process for a command, ``python -m nvae_lightning.NAME``; else do nothing."""
    # Python imports the package to find a module of it: the arguments then begin with "-m".
    if sys.argv[:1] != ["-m"] or not _is_ours(sys.orig_argv):
        return
    take_over()
    # Pictures are files. A notebook's backend, which its subprocesses inherit, may not be
    # installed here; Matplotlib could then not be imported.
    os.environ["MPLBACKEND"] = "agg"
    if os.environ.get("HYDRA_FULL_ERROR") != "1":
        sys.excepthook = _show_error  # torch makes its compiler's cache when it is imported


def _is_ours(command: list[str]) -> bool:
    pairs = pairwise(command)
    return any(a == "-m" and b.partition(".")[0] == "nvae_lightning" for a, b in pairs)


def _show_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a system error as one line, any other with its traceback."""
    message = describe_system_error(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"error: {message}", file=sys.stderr)
