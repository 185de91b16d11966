"""What the commands share: where the configs are, one-line errors, jobs of several processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import ContextDecorator
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    OverrideParseException,
)
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from nvae_lightning.cli import run_folder
from nvae_lightning.cli.command_line import complete_overrides, describe_grammar
from nvae_lightning.cli.known_settings import explain
from nvae_lightning.cli.setting_types import check_type
from nvae_lightning.cli.system_errors import describe_system_error
from nvae_lightning.training.divergence import DivergedError
from nvae_lightning.utilities.signals import Interrupted, raised, tell

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parents[1]

#: Folder that holds ``conf/`` and ``experiments/``: the checkout, or the installed package's copy.
CONFIG_ROOT = _CHECKOUT if (_CHECKOUT / "conf").is_dir() else _PACKAGE / "_configs"


#: Lightning's names of training and inference in float16, with weights in float32.
HALF = ("16-mixed", "16")


class ExperimentsSource(FileConfigSource):
    """Files of the root, of which only ``experiments/`` is listed: ``--help`` lists everything."""

    @staticmethod
    def scheme() -> str:
        """Begin such paths with this."""
        return "experiments"

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List what a folder holds."""
        if config_path == "":
            return ["experiments"] if results_filter in (None, ObjectType.GROUP) else []
        return super().list(config_path, results_filter)


class ExperimentsSearchPath(SearchPathPlugin):
    """Let ``experiments=NAME`` find the files beside ``conf/``."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the root, behind whatever the user gave."""
        search_path.append("nvae_lightning", f"experiments://{CONFIG_ROOT}")


Plugins.instance().register(ExperimentsSource)
Plugins.instance().register(ExperimentsSearchPath)


def _auto_precision() -> str:
    if not torch.cuda.is_available():
        return "32-true"
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if native else "16-mixed"


def _auto_epochs(max_steps: int, epochs: int) -> int:
    # Of another type, it is refused with all the others of another type.
    return -1 if isinstance(max_steps, int) and max_steps > 0 else epochs


def _run_name(now: str) -> str:
    """Name a run's folder: all processes have to come to the same name."""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job and step:  # started by srun, and so again if the job is put in the queue again
        return f"slurm-{job}.{step}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(
            "hydra.run.dir: under torchrun every process would name a folder of its own; "
            "set hydra.run.dir=FOLDER"
        )
    return now


def _sweep_name() -> str | None:
    """Name a sweep as its folder, under which W&B puts its runs together."""
    config = HydraConfig.get()
    if config.mode is not RunMode.MULTIRUN or OmegaConf.is_missing(config.runtime, "output_dir"):
        return None  # no sweep, or one whose config is only printed
    return Path(config.sweep.dir).name


def _chosen(*groups: str) -> Any:  # noqa: ANN401 -- beartype warns of ListConfig's own bases
    """Name what is chosen of some groups of configs; of some nothing need be."""
    choices = HydraConfig.get().runtime.choices
    return OmegaConf.create([choices[group] for group in groups if choices.get(group)])


OmegaConf.register_new_resolver("auto_precision", _auto_precision, replace=True)
OmegaConf.register_new_resolver("auto_epochs", _auto_epochs, replace=True)
OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)
OmegaConf.register_new_resolver("chosen", _chosen, replace=True)


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


def check_precision(name: str, precision: object, accelerator: str) -> None:
    """Check that this machine computes in a precision, and warn if it does so slowly.

    Args:
        name: of the setting.
        precision: Lightning's name of the number format.
        accelerator: what computes: ``cpu``, or anything else for the best that there is.

    Raises:
        ValueError: If it does not.
    """
    best = torch.accelerator.current_accelerator(check_available=True)
    device_type = "cpu" if best is None or accelerator == "cpu" else best.type
    if str(precision) in HALF and device_type != "cuda":
        raise ValueError(
            f"{name}: got {precision}, which takes a GPU; set {name}=bf16-mixed or 32-true"
        )
    if str(precision).startswith("bf16") and device_type == "cpu" and not _cpu_has_bf16():
        rank_zero_warn(
            f"{name}: got {precision}, for which this CPU has no instructions, so that it takes "
            f"several times as long as in 32 bits; set {name}=32-true"
        )


def _cpu_has_bf16() -> bool:
    """Whether oneDNN computes in bf16 here, which on x86 takes AVX-512."""
    has_onednn = torch.backends.mkldnn.is_available()
    return has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def hide_warnings() -> None:
    """Hide warnings of Lightning's about what no user could change."""
    # Lightning 2.6's use of a class that torch deprecates.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
    # Our loaders read ahead in a thread, which it does not see.
    warnings.filterwarnings("ignore", message="The .* does not have many workers")
    # Every login node of SLURM has srun, and a run on it needs none.
    warnings.filterwarnings("ignore", message="The `srun` command is available")


def keep_freed_memory() -> None:
    """Let glibc keep memory that is freed rather than give it back to the system.

    It gives every large feature map back, and is given new pages, which the system fills with
    zeros, for the next: a tenth of a training step on a CPU.
    """
    if sys.platform != "linux" or not hasattr(glibc := ctypes.CDLL(None), "mallopt"):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # of malloc.h
    glibc.mallopt(m_mmap_max, 0)
    glibc.mallopt(m_trim_threshold, 2**31 - 1)
    glibc.mallopt(m_top_pad, 2**26)


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


def check_seed(seed: object) -> None:
    """Check a seed.

    Raises:
        ValueError: If it is none.
    """
    check_type("seed", seed, int)
    if not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise ValueError(f"seed must be at least 0 and below 2^32, got {seed}")
