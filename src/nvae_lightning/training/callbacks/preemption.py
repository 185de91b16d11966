"""Checkpoint, exit and requeueing at a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_warn

from nvae_lightning.training.callbacks.checkpoint import Checkpoint, is_last_step
from nvae_lightning.utilities.image import require_int
from nvae_lightning.utilities.signals import SIGNALS, Interrupted, is_first_rank

P = ParamSpec("P")
R = TypeVar("R")

_SECONDS_TO_END = 20  # for the other ranks


class EndRanks(Callback):
    """Forward a signal that ends this process to the ranks that it launched.

    Lightning's own handlers are disabled: at SIGTERM they end an evaluation with status 0, and at
    SIGUSR1 under SLURM they save and requeue within a step.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from installing its handlers."""
        trainer._signal_connector.register_signal_handlers = lambda: None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Wait for the other ranks to end; kill them if they do not."""
        launcher = trainer.strategy.launcher
        if not isinstance(exception, Interrupted):
            return
        if not isinstance(launcher, _SubprocessScriptLauncher):
            return
        # Lightning's observer would treat their exit status as a failure and kill this process.
        ranks, launcher.procs[:] = list(launcher.procs), []
        for rank in ranks:
            rank.send_signal(exception.signum)
        deadline = time.monotonic() + _SECONDS_TO_END
        for rank in ranks:
            try:
                rank.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                rank.kill()


class Preemption(EndRanks):
    """Save a checkpoint and exit at SIGTERM, SIGUSR1 or Ctrl-C, after the current step.

    All ranks exit after the same step, whichever received the signal. Under SLURM the job is
    requeued after SIGUSR1 (``sbatch --signal=USR1@120``). A second Ctrl-C exits immediately.

    Args:
        check_every_n_steps: Steps between two exchanges of received signals among the ranks.
    """

    def __init__(self, check_every_n_steps: int = 10) -> None:
        require_int("callbacks.preemption.check_every_n_steps", check_every_n_steps, 1)
        self.check_every_n_steps = check_every_n_steps
        self._received = 0
        self._previous: dict[int, Any] = {}
        self._launcher: object = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers."""
        self._received = 0
        self._launcher = trainer.strategy.launcher
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._received and signum == signal.SIGINT:
            raise Interrupted(signum)
        if not self._received and isinstance(self._launcher, _SubprocessScriptLauncher):
            self._launcher.kill(signum)  # the other ranks on this machine
        self._received = self._received or signum

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Save and exit if any rank has received a signal; in an epoch's last step, only save.

        Raises:
            Interrupted: If a rank has received a signal.
        """
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return  # the accumulated gradients would be lost
        is_last = loop.batch_progress.is_last_batch
        if trainer.world_size > 1 and trainer.global_step % self.check_every_n_steps:
            return
        if is_last_step(trainer):
            return
        if received := self._received_by_any(trainer, pl_module):
            self._save(trainer)
            if not is_last:
                self._end(trainer, received)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and exit after the validation, so that a resume does not repeat it.

        Raises:
            Interrupted: If any rank has received a signal.
        """
        if received := self._received_by_any(trainer, pl_module):
            self._save(trainer)
            self._end(trainer, received)

    def _received_by_any(self, trainer: Trainer, pl_module: LightningModule) -> int:
        if trainer.world_size == 1:
            return self._received
        number = torch.tensor(self._received, device=pl_module.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)

    def _save(self, trainer: Trainer) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoint):
                callback.save_now(trainer, again=True)

    def _end(self, trainer: Trainer, received: int) -> None:
        trainer.strategy.barrier("preemption")
        raise Interrupted(received, is_saved=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the signal handlers; Lightning calls no `teardown` after an exception."""
        self.teardown(trainer, pl_module, "fit")
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def requeued_at_sigusr1(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that this SLURM job, if it is one, is requeued after SIGUSR1.

    ``sbatch --signal=USR1@120`` sends the signal before the time limit. Requeueing comes last,
    because SLURM then kills the job.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Interrupted as interrupted:
            if str(interrupted) == "SIGUSR1" and is_first_rank():
                _requeue()
            raise

    return run


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
