"""Turn functions of a config into commands that check it and lock the run's folder.

What imports Lightning is imported when a job runs: that takes seconds, and printing a config does
not need it.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import read_write

from nvae_lightning.cli import run_folder
from nvae_lightning.cli.command_line import complete_overrides
from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.cli.errors import one_line_errors
from nvae_lightning.utilities.signals import is_first_rank, raised

_CONF = CONFIG_ROOT / "conf"


def command(name: str, *, resumes: bool = False) -> Callable[[Callable[[Any], Any]], Any]:
    """Decorate a function of a config as a command.

    Args:
        name: Name of its config.
        resumes: Whether ``ckpt_path`` names a run to resume, with that run's settings.
    """

    def decorate(function: Callable[[Any], Any]) -> Any:  # noqa: ANN401
        @wraps(function)
        def run_job(config: Any) -> Any:  # noqa: ANN401
            from nvae_lightning.cli.known_settings import check_known
            from nvae_lightning.cli.machine import prepare_process
            from nvae_lightning.cli.setting_types import check_types

            job = HydraConfig.get()
            with one_line_errors():
                if "run_dir" in config:
                    config.run_dir = job.runtime.output_dir
                check_known(config, job.job.config_name)
                check_types(config)
                prepare_process()
                if job.mode is not RunMode.MULTIRUN:
                    return function(config)
                run_folder.hold(Path(job.runtime.output_dir))
                try:
                    result = function(config)
                finally:
                    run_folder.release()
                if is_search() and isinstance(result, float) and not math.isfinite(result):
                    raise ValueError(f"the result is {result}, which a search cannot compare")
                return result

        made: Any = hydra.main(version_base="1.3", config_path=str(_CONF), config_name=name)(
            run_job
        )
        made.config_name, made.resumes = name, resumes
        return made

    return decorate


def is_search() -> bool:
    """Return whether this job is a trial of a sweeper that compares results."""
    job = HydraConfig.get()
    is_basic = str(job.sweeper._target_).endswith("BasicSweeper")
    return job.mode is RunMode.MULTIRUN and not is_basic


class Checks(Callback):
    """Checks before Hydra writes to a run's folder."""

    def on_run_start(self, config: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Refuse settings that nothing reads, and a folder that another run writes to."""
        from nvae_lightning.cli.known_settings import check_known

        with one_line_errors():
            check_known(config, config.hydra.job.config_name)
            run_folder.hold(Path(config.hydra.run.dir))
        if not is_first_rank():  # one rank writes to the folder, which all machines may share
            with read_write(config.hydra):
                config.hydra.output_subdir = None
                config.hydra.job_logging = {"root": None}


def run(command: Callable[[], Any]) -> None:
    """Run a command; errors, including those in composing its config, are one line."""
    arguments = " ".join(sys.argv[1:]).replace("=", " ").split()
    asked = [("--cfg", "job"), ("-c", "job")]
    if any(pair in asked for pair in pairwise(arguments)) and "--resolve" not in arguments:
        sys.argv.append("--resolve")  # interpolations are no help to a reader
    # Hydra then raises errors instead of printing them in its own way.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with raised(), one_line_errors():
            if getattr(command, "resumes", False):
                complete_overrides()
            try:
                command()
            except ConfigCompositionException as error:
                # Hydra recommends a plus, even where it only adds a setting that nothing reads.
                pattern = r"(?:In '([^']+)': )?Could not override '((?!hydra\.)[^']+)'"
                found = re.search(pattern, str(error))
                if found is None:
                    raise
                from nvae_lightning.cli.known_settings import refusal

                file, setting = found.groups()
                name = getattr(command, "config_name", "")
                message = refusal(setting, name)
                if file is not None:
                    message = (
                        f"{file.replace('/', '=')}: chooses {setting}, a group that {name} does "
                        "not have; choose its other groups and settings one by one"
                    )
                elif "." in setting:
                    message += f" (+{setting}=… adds an argument of its class)"
                raise ValueError(message) from error
    except SystemExit as end:
        if end.code and end.code != 1:  # objects deleted half-made would print tracebacks
            sys.unraisablehook = lambda _: None
        raise
    finally:
        run_folder.release()
