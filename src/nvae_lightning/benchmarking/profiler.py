"""Time of a training step by phases."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.profilers import SimpleProfiler
from torch.profiler import profile

from nvae_lightning.utilities.files import whole_file, write_text

#: Lightning's actions, or the watched method, of each phase of a training step.
_ACTIONS = {
    "data": r".*\.train_dataloader_next|.*\.batch_to_device",
    "forward": r"\[Strategy\].*\.training_step",
    "penalties": r"penalties",
    "backward": r"\[Strategy\].*\.backward",
    "optimizer": r"\[LightningModule\].*\.optimizer_step",
}


class PhaseProfiler(SimpleProfiler):
    """Split the time of a training into phases, without gaps or overlaps.

    An accelerator computes asynchronously: while `synchronize` is set, each action waits for its
    own computations.

    Attributes:
        synchronize: Waits for the accelerator at the boundaries of every action.
    """

    def __init__(self) -> None:
        super().__init__()
        self.synchronize: Callable[[], None] | None = None
        self._since = time.perf_counter()

    def start(self, action_name: str) -> None:
        """Start an action's clock."""
        self._wait()
        super().start(action_name)

    def stop(self, action_name: str) -> None:
        """Stop an action's clock."""
        self._wait()
        super().stop(action_name)

    def describe(self) -> None:
        """Do not print Lightning's report."""

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
        self._wait()
        self.recorded_durations.clear()
        self._since = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase since the last restart."""
        self._wait()
        total = time.perf_counter() - self._since
        found = {
            phase: math.fsum(
                seconds
                for action, durations in self.recorded_durations.items()
                if re.fullmatch(actions, action)
                for seconds in durations
            )
            for phase, actions in _ACTIONS.items()
        }
        # Lightning runs the forward and backward passes within the optimiser's step.
        found["optimizer"] -= found["forward"] + found["backward"]
        found["forward"] -= found["penalties"]
        return {**found, "other": total - sum(found.values())}

    def _wait(self) -> None:
        if self.synchronize is not None:
            self.synchronize()


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
