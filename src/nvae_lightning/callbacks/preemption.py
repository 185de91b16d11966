"""Ending at a signal with everything saved."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from nvae_lightning.callbacks.checkpoint import Checkpoint

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)


class Interrupted(BaseException):
    """A signal ended the training, and a checkpoint was saved.

    Args:
        signum: number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Preemption(Callback):
    """Save a checkpoint and end at SIGTERM, SIGUSR1 or Ctrl-C, after the step at hand.

    All ranks end after the same step, whichever got the signal. Under SLURM the job is put in the
    queue again after SIGUSR1 (``sbatch --signal=USR1@120``). A second Ctrl-C ends at once; and so
    does a process that does not come to the end of a step, because another rank has died.

    Args:
        check_every_n_steps: with several ranks, steps after which they ask each other.
        grace_seconds: time for a step to end.
    """

    def __init__(self, check_every_n_steps: int = 10, grace_seconds: int | float = 30) -> None:
        if check_every_n_steps < 1 or grace_seconds <= 0:
            raise ValueError(
                "callbacks.preemption: check_every_n_steps must be at least 1 and grace_seconds "
                f"positive, got {check_every_n_steps} and {grace_seconds}"
            )
        self.check_every_n_steps = check_every_n_steps
        self.grace_seconds = grace_seconds
        self._received = 0
        self._previous: dict[int, Any] = {}
        self._watchdog: threading.Timer | None = None
        self._launcher: object = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals, also from Lightning, which would end within a step."""
        self._received = 0
        self._launcher = trainer.strategy.launcher
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._received and isinstance(self._launcher, _SubprocessScriptLauncher):
            self._launcher.kill(signum)  # Lightning's other processes on this machine
        self._received = self._received or signum
        if self._watchdog is None:
            self._watchdog = threading.Timer(self.grace_seconds, os._exit, (128 + signum,))
            self._watchdog.daemon = True
            self._watchdog.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Save and end if any rank has got a signal.

        Raises:
            Interrupted: if so.
        """
        received = self._received
        if trainer.world_size > 1:
            if trainer.global_step % self.check_every_n_steps:
                return
            number = torch.tensor(received, device=pl_module.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            received = int(number)
        if not received:
            return
        self._stop_watchdog()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoint):
                callback.save_now(trainer)
        trainer.strategy.barrier("preemption")
        if received == getattr(signal, "SIGUSR1", None) and trainer.is_global_zero:
            _requeue()
        raise Interrupted(received)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._stop_watchdog()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _stop_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None


def _requeue() -> None:
    """Put this SLURM job, if it is one, in the queue again."""
    job = os.environ.get("SLURM_JOB_ID")
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is not None and re.fullmatch(r"[0-9_]+", job):
        subprocess.run(["scontrol", "requeue", job], check=False)
