"""What makes a function a command: its config is checked, its folder is its own."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.experimental.callback import Callback
from hydra.types import RunMode

from nvae_lightning.cli import run_folder
from nvae_lightning.cli.command_line import complete_overrides
from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.cli.errors import one_line_errors
from nvae_lightning.cli.known_settings import check_known, check_known_to_hydra, explain
from nvae_lightning.utilities.signals import raised

_CONF = CONFIG_ROOT / "conf"


def _let_searches_go_on() -> None:
    """Let a failed trial not end a search by Optuna, where that plugin is installed."""
    store = ConfigStore.instance()
    if "optuna.yaml" in store.list("hydra/sweeper"):
        node = store.load("hydra/sweeper/optuna.yaml").node
        node.max_failure_rate = 1.0
        store.store(name="optuna", node=node, group="hydra/sweeper", provider="nvae_lightning")


_let_searches_go_on()


def command(name: str, *, resumes: bool = False) -> Callable[[Callable[[Any], Any]], Any]:
    """Make a function of a config a command of Hydra's.

    Args:
        name: Name of its config.
        resumes: Whether ``ckpt_path`` names a run to resume, with that run's settings.
    """

    def decorate(function: Callable[[Any], Any]) -> Any:  # noqa: ANN401
        @wraps(function)
        def run_job(config: Any) -> Any:  # noqa: ANN401
            job = HydraConfig.get()
            with one_line_errors():
                check_known(config, job.job.config_name, job.runtime.choices.get("dataset"), _CONF)
                if job.mode is not RunMode.MULTIRUN:
                    return function(config)
                return _run_trial(function, config)

        made: Any = hydra.main(version_base="1.3", config_path=str(_CONF), config_name=name)(
            run_job
        )
        made.config_name, made.resumes = name, resumes
        return made

    return decorate


def is_search() -> bool:
    """Whether this job is a trial of a sweeper that compares results."""
    job = HydraConfig.get()
    is_basic = str(job.sweeper._target_).endswith("BasicSweeper")
    return job.mode is RunMode.MULTIRUN and not is_basic


def _run_trial(function: Callable[[Any], Any], config: Any) -> object:  # noqa: ANN401
    """Run one job of a sweep, which other jobs do not depend on."""
    job = HydraConfig.get()
    sweep = Path(job.sweep.dir)
    try:
        run_folder.hold(Path(job.runtime.output_dir))
        result = function(config)
        if is_search() and isinstance(result, float) and not math.isfinite(result):
            raise ValueError(f"the result is {result}, which a search cannot compare")
    except Exception as error:
        with (sweep / FAILURES).open("a", encoding="utf-8") as file:
            reason = " ".join(str(error).split())
            file.write(f"{job.job.num}: {type(error).__name__}: {reason}\n")
        raise
    finally:
        run_folder.release()
    return result


#: File of a sweep with a line per job that has failed.
FAILURES = "failed.txt"


class Checks(Callback):
    """What is checked before Hydra writes to a run's folder, and what is told after a sweep."""

    def on_run_start(self, config: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Refuse settings that nothing reads, and a folder that another run writes to."""
        with one_line_errors():
            check_known_to_hydra(config.hydra)
            choices = config.hydra.runtime.choices
            check_known(config, config.hydra.job.config_name, choices.get("dataset"), _CONF)
            run_folder.hold(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Refuse settings that Hydra has not; forget the failures of an earlier sweep."""
        with one_line_errors():
            check_known_to_hydra(config.hydra)
        (Path(config.hydra.sweep.dir) / FAILURES).unlink(missing_ok=True)

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Say which jobs have failed, where that has not ended the sweep."""
        file = Path(config.hydra.sweep.dir) / FAILURES
        if file.is_file():
            failed = [line.partition(":")[0] for line in file.read_text("utf-8").splitlines()]
            print(f"failed: {len(failed)} jobs ({', '.join(failed)}), for which see '{file}'")


def run(command: Callable[[], Any]) -> None:
    """Run a command, whose errors, those of composing its config included, are one line."""
    arguments = " ".join(sys.argv[1:]).replace("=", " ").split()
    asked = [("--cfg", "job"), ("-c", "job")]
    if any(pair in asked for pair in pairwise(arguments)) and "--resolve" not in arguments:
        sys.argv.append("--resolve")  # interpolations say nothing to a reader
    # Hydra then lets every error through to here instead of printing it in its own way.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with raised(), one_line_errors():
            overrides = complete_overrides(resumes=getattr(command, "resumes", False))
            try:
                command()
            except ConfigCompositionException as error:
                name = getattr(command, "config_name", None)
                message = " ".join(str(error).split())
                explained = name and explain(message, name, overrides, CONFIG_ROOT / "conf")
                if not explained:
                    raise
                raise ValueError(explained) from error
    except SystemExit as end:
        if end.code and end.code != 1:  # what is half made would add tracebacks as it is deleted
            sys.unraisablehook = lambda _: None
        raise
    finally:
        run_folder.release()
