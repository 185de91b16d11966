"""Requeueing of SLURM jobs."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import ContextDecorator
from types import TracebackType

from lightning.pytorch.utilities import rank_zero_warn

from nvae_lightning.utilities.signals import Interrupted, is_first_rank


class requeued_at_sigusr1(ContextDecorator):
    """Requeue this SLURM job, if it is one, after SIGUSR1 has ended it.

    ``sbatch --signal=USR1@120`` sends the signal before the time limit. Requeueing comes last,
    because SLURM then kills the job.
    """

    def __enter__(self) -> None:
        """Do nothing yet."""

    def __exit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Requeue the job on the first rank."""
        is_asked = isinstance(error, Interrupted) and str(error) == "SIGUSR1"
        if is_asked and is_first_rank():
            _requeue()


def _requeue() -> None:
    job = os.environ.get("SLURM_JOB_ID")
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None or not re.fullmatch(r"[0-9_]+", job):
        return
    try:
        status = subprocess.run(["scontrol", "requeue", job]).returncode
    except OSError as error:
        status = str(error)
    # A negative status is a signal: SLURM has killed scontrol with the job.
    if isinstance(status, str) or status > 0:
        rank_zero_warn(f"the job was not requeued ({status}): run scontrol requeue {job}")
