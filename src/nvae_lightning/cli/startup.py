"""Preparation of a command's process before it imports torch."""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from nvae_lightning.cli.system_errors import describe_system_error
from nvae_lightning.utilities.signals import take_over

_PACKAGE = Path(__file__).resolve().parents[1]


def begin_command() -> None:
    """Prepare this process if it runs a command; otherwise do nothing."""
    if not _runs_command():
        return
    take_over()
    # Figures are files. A notebook's backend, which its subprocesses inherit, may not be
    # installed here; Matplotlib could then not be imported.
    os.environ["MPLBACKEND"] = "agg"
    if os.environ.get("HYDRA_FULL_ERROR") != "1":
        sys.excepthook = _show_error  # torch creates its compiler's cache when it is imported


def _runs_command() -> bool:
    if sys.argv[:1] == ["-m"]:  # Python imports the package to find one of its modules
        pairs = pairwise(sys.orig_argv)
        return any(a == "-m" and b.partition(".")[0] == "nvae_lightning" for a, b in pairs)
    script = Path(sys.argv[0]) if sys.argv else Path()
    return script.stem == "nvae" or script.absolute().parent == _PACKAGE


def _show_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a system error as one line, any other with its traceback."""
    message = describe_system_error(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"error: {message}", file=sys.stderr)
