"""Time of a training step by phases."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from torch.profiler import profile

from nvae_lightning.utilities.files import whole_file, write_text

#: Phases of a training step, by the names of Lightning's actions and of the watched method. Any
#: other action belongs to the phase around it: hooks before a step to the optimiser.
_PHASES = {
    r".*\.train_dataloader_next|\[LightningDataModule\].*|.*\.batch_to_device": "data",
    r"\[Strategy\].*\.training_step": "forward",
    r"penalties": "penalties",
    r"\[Strategy\].*\.backward": "backward",
    r"\[LightningModule\].*\.optimizer_step": "optimizer",
}
PHASES = (*_PHASES.values(), "other")


class PhaseProfiler(Profiler):
    """Split the time of a training into phases, without gaps or overlaps.

    A phase inside another, such as the forward pass inside the optimiser's step, counts only as
    itself. An accelerator computes asynchronously: while `synchronize` is set, each phase waits
    for its own computations.

    Attributes:
        synchronize: Waits for the accelerator at every phase boundary.
    """

    def __init__(self) -> None:
        super().__init__()
        self.synchronize: Callable[[], None] | None = None
        self._phases = ["other"]  # a stack: the phase of each action in progress
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def start(self, action_name: str) -> None:
        """Enter the action's phase, if it has one of its own."""
        found = (phase for name, phase in _PHASES.items() if re.fullmatch(name, action_name))
        phase = next(found, self._phases[-1])
        if phase != self._phases[-1]:
            self._count()
        self._phases.append(phase)

    def stop(self, action_name: str) -> None:
        """Return to the phase around the action."""
        if self._phases[-1] != self._phases[-2]:
            self._count()
        self._phases.pop()

    def watch(self, module: object, method: str) -> None:
        """Make a method of an object an action, under the method's own name."""
        function = getattr(module, method)

        @wraps(function)
        def profiled(*arguments: Any) -> Any:  # noqa: ANN401
            with self.profile(method):
                return function(*arguments)

        setattr(module, method, profiled)

    def restart(self) -> None:
        """Reset all times."""
        self._count()
        self._seconds.clear()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase since the last restart."""
        self._count()
        return {phase: self._seconds[phase] for phase in PHASES}

    def _count(self) -> None:
        if self.synchronize is not None:
            self.synchronize()
        now = time.perf_counter()
        self._seconds[self._phases[-1]] += now - self._since
        self._since = now


def write_trace(profiled: profile, device: torch.device, path: Path) -> None:
    """Write a trace for chrome://tracing, and beside it a table of the longest operations.

    Args:
        profiled: Profile of some steps.
        device: Device that computed them.
        path: JSON file to write; the table has the suffix ``.txt``.
    """
    with whole_file(path) as partial:
        profiled.export_chrome_trace(str(partial))
    order = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    table = profiled.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=80)
    write_text(path.with_suffix(".txt"), table)
