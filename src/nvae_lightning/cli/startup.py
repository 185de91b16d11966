"""Preparation of a command's process before it imports torch."""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from nvae_lightning.utilities.files import unusable
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
        sys.excepthook = _show_error


def _runs_command() -> bool:
    if sys.argv[:1] == ["-m"]:  # Python imports the package to find one of its modules
        pairs = pairwise(sys.orig_argv)
        return any(a == "-m" and b.partition(".")[0] == "nvae_lightning" for a, b in pairs)
    script = Path(sys.argv[0]) if sys.argv else Path()
    return script.stem == "nvae" or script.absolute().parent == _PACKAGE


def _show_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an unusable file as one line, because importing torch creates its compiler's cache."""
    if isinstance(error, OSError) and error.filename is not None:
        hint = "TORCHINDUCTOR_CACHE_DIR sets the folder of torch's compiler"
        print(f"error: {unusable(error)}; {hint}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
