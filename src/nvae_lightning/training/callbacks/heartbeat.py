"""Detection of ranks that have stopped."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from tqdm import tqdm

from nvae_lightning.utilities.signals import consequence

_INTERVAL = 5.0  # seconds
_DONE = b"done"


class Heartbeat(Callback):
    """End all ranks with a one-line error if a rank or its machine stops.

    Every rank increments its own counter in the store of the process group and watches the other
    counters. Only intervals in which this rank runs count, so a job that is suspended as a whole
    (Ctrl-Z) can continue.

    Args:
        timeout_minutes: Time after which a rank whose counter does not change counts as missing.
    """

    def __init__(self, timeout_minutes: int | float) -> None:
        self.timeout_minutes = timeout_minutes
        self.interval = min(_INTERVAL, 60 * timeout_minutes / 10)
        self.limit = math.ceil(60 * timeout_minutes / self.interval)
        self._ended = threading.Event()
        self._ended.set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the two threads."""
        if not self._ended.is_set() or not torch.distributed.is_initialized():
            return
        self._rank, self._num_ranks = trainer.global_rank, trainer.world_size
        self._local_rank, self._launcher = trainer.local_rank, trainer.strategy.launcher
        self._silent = [0] * self._num_ranks  # intervals without an answer
        self._seen: Sequence[bytes] = [b""] * self._num_ranks
        self._ended, self._is_done = threading.Event(), False
        # Two threads, because requests to a store whose process is stopped block forever.
        self._beating, watching = (
            threading.Thread(target=loop, args=(self._ended,), daemon=True)
            for loop in (self._beat, self._watch)
        )
        self._beating.start()
        watching.start()

    def _beat(self, ended: threading.Event) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            # A separate connection, because requests on one connection wait for each other.
            own = TCPStore(address, port, timeout=timedelta(days=1), wait_for_workers=False)
            store = PrefixStore("nvae_lightning", own)
            names = [f"rank{rank}" for rank in range(self._num_ranks)]
            count = 0
            while not ended.wait(self.interval if count else 0):
                count += 1
                store.set(names[self._rank], str(count))
                self._seen = store.multi_get(names)
            if self._is_done:
                store.set(names[self._rank], _DONE.decode())
        except RuntimeError:
            return  # the process that owns the store has ended

    def _watch(self, ended: threading.Event) -> None:
        before = self._seen
        while not ended.wait(self.interval):
            now = self._seen
            if now[0]:  # otherwise a rank has not started
                for rank, (old, new) in enumerate(zip(before, now, strict=True)):
                    answers = new != old or new == _DONE
                    self._silent[rank] = 0 if answers else self._silent[rank] + 1
            before = now
            if missing := missing_ranks(self._silent, self.limit, self._rank):
                self._leave(missing)

    def _leave(self, missing: list[int]) -> None:
        """Exit, and kill the processes on this machine that cannot exit on their own."""
        position = [r for r in range(self._num_ranks) if r not in missing].index(self._rank)
        time.sleep(position * self.interval)  # the first one ends the others
        names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        if len(getattr(tqdm, "_instances", ())):  # progress bars, which leave their line open
            print(file=sys.stderr)
        print(
            f"error: {names} {'have' if len(missing) > 1 else 'has'} not answered for "
            f"{self.timeout_minutes:g} minutes (trainer.timeout_minutes); {consequence()}",
            file=sys.stderr,
            flush=True,
        )
        if isinstance(self._launcher, _SubprocessScriptLauncher):
            for process in self._launcher.procs:
                process.kill()
        if self._rank - self._local_rank in missing and _is_started_by_lightning():
            os.kill(os.getppid(), signal.SIGKILL)
        os._exit(1)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Exit without a message if another rank has reported the missing one."""
        if self._ended.is_set():
            return
        is_ours = not isinstance(exception, RuntimeError)  # which collectives raise
        if not is_ours and missing_ranks(self._silent, self.limit // 2, self._rank):
            os._exit(1)
        self._ended.set()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the other ranks that this one has finished."""
        if not self._ended.is_set():
            self._is_done = True
            self._ended.set()
            self._beating.join(timeout=self.interval)


def missing_ranks(silent: Sequence[int], limit: int, own: int) -> list[int]:
    """Return the ranks that have been silent for too long.

    Args:
        silent: Number of intervals without an answer, by rank.
        limit: Number of intervals that counts as too long.
        own: Rank of this process. If its own counter does not change, rank 0, which owns the
            store, has stopped.

    >>> missing_ranks([0, 9, 0], 5, own=0), missing_ranks([9, 9, 9], 5, own=1)
    ([1], [0])
    """
    found = [rank for rank, number in enumerate(silent) if number >= limit]
    return [0] if own in found else found


def _is_started_by_lightning() -> bool:
    return any(text.startswith("hydra.job.name=train_ddp_process") for text in sys.argv)
