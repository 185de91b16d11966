"""Ending at a signal with everything saved."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from nvae_lightning.training.callbacks.checkpoint import Checkpoint, is_last_step
from nvae_lightning.utilities.signals import SIGNALS, Interrupted, leave

_SECONDS_TO_END = 20  # for the other ranks


class EndRanks(Callback):
    """Pass a signal that ends this process on to the ranks that it has started.

    Lightning's own handlers are left out: at SIGTERM they end an evaluation with status 0, and at
    SIGUSR1 under SLURM they save and requeue within a step.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from registering its handlers."""
        trainer._signal_connector.register_signal_handlers = _register_nothing

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Wait for the other ranks to end, too; by force if need be."""
        launcher = trainer.strategy.launcher
        if not isinstance(exception, Interrupted):
            return
        if not isinstance(launcher, _SubprocessScriptLauncher):
            return
        # Lightning's observer would take their status for a failure, and kill this process.
        ranks, launcher.procs[:] = list(launcher.procs), []
        for rank in ranks:
            rank.send_signal(exception.signum)
        deadline = time.monotonic() + _SECONDS_TO_END
        for rank in ranks:
            try:
                rank.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                rank.kill()


def _register_nothing() -> None:
    pass


class Preemption(EndRanks):
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
        self._is_validating = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals, also from Lightning, which would end within a step."""
        self._received = 0
        self._launcher = trainer.strategy.launcher
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._received and signum == signal.SIGINT:
            raise Interrupted(signum)
        if not self._received and isinstance(self._launcher, _SubprocessScriptLauncher):
            self._launcher.kill(signum)  # Lightning's other processes on this machine
        self._received = self._received or signum
        if self._watchdog is None and not self._is_validating:
            self._watchdog = threading.Timer(self.grace_seconds, leave, (signum,))
            self._watchdog.daemon = True
            self._watchdog.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Save and end if any rank has received a signal; in an epoch's last step, only save.

        Raises:
            Interrupted: If so.
        """
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return  # its gradients would be lost
        is_last = loop.batch_progress.is_last_batch
        if trainer.world_size > 1 and trainer.global_step % self.check_every_n_steps:
            return
        if is_last_step(trainer):
            return
        if received := self._received_by_any(trainer, pl_module):
            self._save(trainer)
            if not is_last:
                self._end(trainer, received)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give a validation the time that it takes: the run ends after it."""
        self._is_validating = True
        self._stop_watchdog()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to steps."""
        self._is_validating = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and end after the validation, which a resume then need not repeat.

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
        self._stop_watchdog()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoint):
                callback.save_now(trainer, again=True)

    def _end(self, trainer: Trainer, received: int) -> None:
        trainer.strategy.barrier("preemption")
        raise Interrupted(received, is_saved=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back, as Lightning does not tear callbacks down then."""
        self.teardown(trainer, pl_module, "fit")
        super().on_exception(trainer, pl_module, exception)

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
