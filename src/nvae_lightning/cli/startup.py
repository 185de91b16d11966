"""Preparation of a command's process before it imports torch."""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path

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


def _runs_command() -> bool:
    if sys.argv[:1] == ["-m"]:  # Python imports the package to find one of its modules
        pairs = pairwise(sys.orig_argv)
        return any(a == "-m" and b.partition(".")[0] == "nvae_lightning" for a, b in pairs)
    script = Path(sys.argv[0]) if sys.argv else Path()
    return script.stem == "nvae" or script.absolute().parent == _PACKAGE
