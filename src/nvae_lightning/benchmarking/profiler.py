"""Where the time of a training step goes."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable

from lightning.pytorch.profilers import Profiler

#: Parts of a training step, by the names that Lightning (the penalties: the module) gives to what
#: it does. What is not among them belongs to what it is part of: hooks before a step to the
#: optimiser, for example.
_PHASES = {
    r".*\.train_dataloader_next|\[LightningDataModule\].*|.*\.batch_to_device": "data",
    r"\[Strategy\].*\.training_step": "forward",
    r"penalties": "penalties",
    r"\[Strategy\].*\.backward": "backward",
    r"\[LightningModule\].*\.optimizer_step": "optimizer",
}
PHASES = (*_PHASES.values(), "other")


class PhaseProfiler(Profiler):
    """Part the time of a training among its phases, without gaps or overlaps.

    A phase inside another, as the forward pass inside the optimiser's step, is not counted to it.
    Computations of an accelerator run on after they were started; while `synchronize` is set,
    each phase waits for its own.

    Attributes:
        synchronize: waits for the accelerator, at every border of two phases.
    """

    def __init__(self) -> None:
        super().__init__()
        self.synchronize: Callable[[], None] | None = None
        self._phases = ["other"]  # of the actions that are going on
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def start(self, action_name: str) -> None:
        """Begin a phase, if the action is one."""
        phase = _phase(action_name) or self._phases[-1]
        if phase != self._phases[-1]:
            self._count()
        self._phases.append(phase)

    def stop(self, action_name: str) -> None:
        """Go on with the phase that the action was part of."""
        if self._phases[-1] != self._phases[-2]:
            self._count()
        self._phases.pop()

    def restart(self) -> None:
        """Forget the past."""
        self._count()
        self._seconds.clear()

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase since the last restart."""
        self._count()
        return {phase: self._seconds[phase] for phase in PHASES}

    def _count(self) -> None:
        if self.synchronize is not None:
            self.synchronize()
        now = time.perf_counter()
        self._seconds[self._phases[-1]] += now - self._since
        self._since = now


def _phase(action_name: str) -> str | None:
    found = (phase for name, phase in _PHASES.items() if re.fullmatch(name, action_name))
    return next(found, None)
