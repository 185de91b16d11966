"""The command line: overrides that stand for others, what is wrong with one, and other ranks'."""

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
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from omegaconf import read_write

from nvae_lightning.cli.overrides import how_to_quote
from nvae_lightning.cli.resume import with_saved_overrides


def complete_overrides(*, resumes: bool) -> list[str]:
    """Replace the overrides of this process's command line by those that are meant.

    Args:
        resumes: Whether ``ckpt_path`` names a run to resume, whose overrides come first.

    Returns:
        The overrides.

    Raises:
        ValueError: If those of the run cannot be taken.
    """
    given, _ = get_args_parser().parse_known_args(sys.argv[1:])
    overrides: list[str] = given.overrides
    if not overrides:
        return []
    num = len(overrides)
    start = next(i for i in range(1, len(sys.argv)) if sys.argv[i : i + num] == overrides)
    meant = with_saved_overrides(overrides, is_sweep=given.multirun) if resumes else overrides
    sys.argv[start : start + num] = meant
    return meant


def describe_grammar(error: OverrideParseException) -> str:
    """Say how to write an override that Hydra cannot read."""
    override = error.override
    if not (quoted := how_to_quote(override)):
        return f"{override!r} is no setting; write KEY=VALUE"
    return (
        f"{override}: the value has characters that must be quoted, for Hydra and for the shell; "
        f"write {quoted}"
    )


#: Options of Hydra's that take a value and say where configs are.
_CONFIG_OPTIONS = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")


@contextmanager
def as_single_run(run_dir: Path) -> Iterator[None]:
    """Inside a sweep, let the other processes that Lightning starts run this job, not the sweep.

    Lightning starts them by the command line, which would start the sweep again (and draw other
    values, with Optuna). It is replaced by that of the job alone until the job is over.
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
        config.hydra.run.dir = str(run_dir)  # where Lightning sends the others
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
