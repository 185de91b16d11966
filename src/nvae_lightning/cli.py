"""What the commands share: where the configs are, and errors of one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parents[1]

#: Folder that holds ``conf/`` and ``experiments/``: the checkout, or the installed package's copy.
CONFIG_ROOT = _CHECKOUT if (_CHECKOUT / "conf").is_dir() else _PACKAGE / "_configs"


class ExperimentsSearchPath(SearchPathPlugin):
    """Let ``experiments=NAME`` find the files beside ``conf/``."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the root, behind whatever the user gave."""
        search_path.append("nvae_lightning", f"file://{CONFIG_ROOT}")


Plugins.instance().register(ExperimentsSearchPath)


def _auto_precision() -> str:
    if not torch.cuda.is_available():
        return "32-true"
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if native else "16-mixed"


def _auto_epochs(max_steps: int, epochs: int) -> int:
    return -1 if max_steps > 0 else epochs


OmegaConf.register_new_resolver("auto_precision", _auto_precision, replace=True)
OmegaConf.register_new_resolver("auto_epochs", _auto_epochs, replace=True)
OmegaConf.register_new_resolver("has_gpu", torch.cuda.is_available, replace=True)


# As the user has set it: run() sets it, too.
_SHOW_TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors of a user's settings into one line and exit status 1.

    ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """
    try:
        yield
    except (
        ValueError,
        HydraException,
        MisconfigurationException,
        OmegaConfBaseException,
    ) as error:
        if _SHOW_TRACEBACKS:
            raise
        sys.exit(f"error: {_describe(error)}")


def run(command: Callable[[], Any]) -> None:
    """Run a Hydra command whose errors, those of composing its config included, are one line."""
    arguments = " ".join(sys.argv[1:]).replace("=", " ").split()
    asked = [("--cfg", "job"), ("-c", "job")]
    if any(pair in asked for pair in pairwise(arguments)) and "--resolve" not in arguments:
        sys.argv.append("--resolve")  # interpolations say nothing to a reader
    # Hydra then lets every error through to here instead of printing it in its own way.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with one_line_errors():
        command()


def _describe(error: BaseException) -> str:
    """Describe what the user did wrong, not how we came to notice."""
    place = ""
    while isinstance(error, InstantiationException):
        # "Error in call to target 'x':\nValueError('...')\nfull_key: model.hierarchy"
        _, _, key = str(error).partition("full_key: ")
        place = f"{key.strip()}: " if key else place
        if error.__cause__ is None:
            break
        error = error.__cause__
    message, _, _ = str(error).partition("Config search path:")
    return place + " ".join(message.split())
