"""The command line: its overrides, and the command lines of further ranks."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.distributed
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import read_write

from nvae_lightning.cli.resume import with_saved_overrides


def complete_overrides() -> None:
    """Put the overrides of a resumed run before those of this process's command line.

    Raises:
        ValueError: If the run's overrides are refused.
    """
    given, _ = get_args_parser().parse_known_args(sys.argv[1:])
    num = len(given.overrides)
    if num > 0:
        start = next(i for i in range(len(sys.argv)) if sys.argv[i : i + num] == given.overrides)
        merged = with_saved_overrides(given.overrides, is_sweep=given.multirun)
        sys.argv[start : start + num] = merged


#: Hydra's options for the place of configs.
_CONFIG_OPTIONS = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")


@contextmanager
def as_single_run(run_dir: Path) -> Iterator[None]:
    """Replace the command line of a sweep with the current job's until the job ends.

    Lightning starts further ranks with the command line, which would start the sweep again (and
    draw other values, with Optuna).
    """
    config: Any = HydraConfig.instance().cfg
    if config.hydra.mode is not RunMode.MULTIRUN:
        yield
        return
    arguments, environment = list(sys.argv), dict(os.environ)
    kept = [a for a in arguments if a.startswith(_CONFIG_OPTIONS) and "=" in a]
    kept += [x for pair in pairwise(arguments) if pair[0] in _CONFIG_OPTIONS for x in pair]
    kept += [a for a in arguments if re.match(r"\+*hydra\.(job|hydra_logging|job_logging)", a)]
    job = list(config.hydra.overrides.task)
    with read_write(config.hydra):
        config.hydra.run.dir = str(run_dir)  # which Lightning passes to further ranks
    sys.argv[1:] = [*kept, *job, "hydra.mode=RUN"]
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        sys.argv[:] = arguments
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                os.environ.pop(name, None)
