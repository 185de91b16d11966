"""Signals that end a command: with one line, and with the status 128 + signal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)

_GRACE_SECONDS = 60  # for what is open to be closed, and other processes to be ended


class Interrupted(BaseException):
    """A signal ended the command. No `except Exception` catches it, nor one for Ctrl-C.

    Args:
        signum: Number of the signal.
        is_saved: Whether a checkpoint was saved.
    """

    def __init__(self, signum: int, is_saved: bool = False) -> None:
        super().__init__(signum, is_saved)
        self.signum = signum
        self.is_saved = is_saved

    def __str__(self) -> str:
        """Name the signal."""
        return signal.Signals(self.signum).name


class _State:
    """What the handler needs to know of the command."""

    is_caught = False  # by whoever prints the line; else the handler does
    is_told = False
    received = 0
    consequence = "nothing was finished; give the same command again"


def if_ended(consequence: str) -> None:
    """Say what a signal that ends the command from now on leaves unfinished, and what to do."""
    _State.consequence = consequence


def consequence() -> str:
    """Return what an end from now on leaves unfinished, and what to do."""
    return _State.consequence


def is_first_rank() -> bool:
    """Whether this is the process that writes, by what launchers set in the environment."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def tell(signum: int) -> None:
    """Print the line, once, on the first rank."""
    if not _State.is_told and is_first_rank():
        name = signal.Signals(signum).name
        print(f"ended by {name}: {_State.consequence}", file=sys.stderr, flush=True)
    _State.is_told = True


def leave(signum: int) -> None:
    """Print the line and end the process, whatever it is doing."""
    tell(signum)
    sys.stdout.flush()
    os._exit(128 + signum)


def take_over() -> None:
    """Let signals end this process with one line; child processes have the system's handlers."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        signal.signal(number, _end)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_give_back)


@contextmanager
def raised() -> Iterator[None]:
    """Raise signals as :class:`Interrupted`, for the caller to say so by :func:`tell`."""
    take_over()
    _State.is_caught = True
    try:
        yield
    finally:
        _State.is_caught = False


def _end(signum: int, frame: FrameType | None) -> None:
    if not _State.is_caught:
        leave(signum)
    if not _State.received:
        _State.received = signum
        # If the exception is lost, or what is being closed hangs.
        watchdog = threading.Timer(_GRACE_SECONDS, leave, (signum,))
        watchdog.daemon = True
        watchdog.start()
        raise Interrupted(signum)
    if signum == signal.SIGINT:  # once more: now
        leave(_State.received)


def _give_back() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)
