"""What the commands share: where the configs are, and errors of one line."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
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
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


OmegaConf.register_new_resolver("auto_precision", _auto_precision, replace=True)


def resolve_printed_config() -> None:
    """Make ``--cfg job`` print values, as interpolations say nothing to a reader."""
    if {"--cfg", "-c"} & set(sys.argv) and "job" in sys.argv and "--resolve" not in sys.argv:
        sys.argv.append("--resolve")


def one_line_errors(command: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Print the errors of a user's settings as one line and exit with 1.

    ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """

    @functools.wraps(command)
    def run(config: DictConfig) -> Any:  # noqa: ANN401
        try:
            return command(config)
        except (
            ValueError,
            InstantiationException,
            MisconfigurationException,
            OmegaConfBaseException,
        ) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            sys.exit(f"error: {_describe(error)}")

    return run


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
    return place + " ".join(str(error).split())
