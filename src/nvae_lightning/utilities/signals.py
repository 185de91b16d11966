"""Signals that end a command, with a one-line message and exit status 128 + signal."""

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

_GRACE_SECONDS = 60  # for closing files and ending other processes


class Interrupted(BaseException):
    """End of the command by a signal; neither `Exception` nor `KeyboardInterrupt`.

    Args:
        signum: Number of the signal.
        is_saved: Whether a checkpoint was saved.
    """

    def __init__(self, signum: int, is_saved: bool = False) -> None:
        super().__init__(signum, is_saved)
        self.signum = signum
        self.is_saved = is_saved

    def __str__(self) -> str:
        """Return the name of the signal."""
        return signal.Signals(self.signum).name


class _State:
    """State of the command that the signal handler depends on."""

    is_caught = False  # whether `raised` reports the signal, instead of the handler
    is_told = False
    received = 0
    consequence = "nothing was finished; give the same command again"


def if_ended(consequence: str) -> None:
    """Set the message for a signal: the unfinished work and the remedy."""
    _State.consequence = consequence


def consequence() -> str:
    """Return the message of :func:`if_ended`."""
    return _State.consequence


def is_first_rank() -> bool:
    """Whether this process has rank 0, according to the launchers' environment variables."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def tell(signum: int) -> None:
    """Print the message, once, on the first rank."""
    if not _State.is_told and is_first_rank():
        name = signal.Signals(signum).name
        print(f"ended by {name}: {_State.consequence}", file=sys.stderr, flush=True)
    _State.is_told = True


def leave(signum: int) -> None:
    """Print the message and exit immediately."""
    tell(signum)
    sys.stdout.flush()
    os._exit(128 + signum)


def take_over() -> None:
    """Install the signal handlers in this process; child processes keep the system's."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        signal.signal(number, _end)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_give_back)


@contextmanager
def raised() -> Iterator[None]:
    """Raise signals as :class:`Interrupted`, which the caller reports with :func:`tell`."""
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
        # In case the exception is lost or closing hangs.
        watchdog = threading.Timer(_GRACE_SECONDS, leave, (signum,))
        watchdog.daemon = True
        watchdog.start()
        raise Interrupted(signum)
    if signum == signal.SIGINT:  # a second Ctrl-C exits immediately
        leave(_State.received)


def _give_back() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)
