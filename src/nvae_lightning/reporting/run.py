"""A run: its settings, its metrics, and quantities derived from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from nvae_lightning.objective import bits_per_dim

Over = Literal["last", "end", "median", "late_max"]
Each = Literal["sum", "count", "zeros"]

_END = 0.05  # last fraction of the steps, for a mean at the end of the training


@dataclass(frozen=True)
class Quantity:
    """A quantity computed from a run.

    Args:
        metric: Logged name, with ``*`` for all groups; or ``hours``, the duration of the training
            steps; or ``images``, the number seen in training; or ``teraflop``, the computation of
            the training steps; or ``finite``, 1 if the run reached a finite likelihood and else 0.
        over: How to combine rows: the last, the mean over the end of the training, the median,
            or the maximum of the second half.
        each: How to combine groups: the sum, their number, or the number of zeros.
        in_bits: Whether to convert nats per image to bits per dim.
    """

    metric: str
    over: Over = "last"
    each: Each = "sum"
    in_bits: bool = False


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        name: Name of its folder.
        settings: All settings, by group.
        rows: Logged values, by step.
        flops_per_image: Count of a training step's floating-point operations per image; None if
            unknown.
    """

    name: str
    settings: Mapping[str, Any] = field(repr=False)
    rows: Sequence[Mapping[str, float]] = field(repr=False)
    flops_per_image: Callable[[], float | None] = field(
        default=lambda: None, repr=False, compare=False
    )

    @property
    def is_finished(self) -> bool:
        """Whether the run was tested."""
        return any("test/nll" in row for row in self.rows)

    @property
    def has_diverged(self) -> bool:
        """Whether the guard stopped the run."""
        return not self.is_finished and any("train/diverged" in row for row in self.rows)

    @property
    def has_ended(self) -> bool:
        """Whether the run was tested or has diverged."""
        return self.is_finished or self.has_diverged

    @property
    def is_finite(self) -> bool:
        """Whether the run reached a finite likelihood."""
        nll = self.value(Quantity("test/nll"))
        return nll is not None and math.isfinite(nll)

    @property
    def num_steps(self) -> int:
        """Number of optimiser steps."""
        tests = [int(row["step"]) for row in self.rows if "test/nll" in row]
        return tests[-1] if tests else int(max((row["step"] for row in self.rows), default=-1)) + 1

    @property
    def images_per_step(self) -> int:
        """Number of images per optimiser step, over all devices."""
        accumulated = self.setting("trainer.accumulate_grad_batches") or 1
        devices = self.setting("num_devices") or 1
        return int(self.setting("dataset.batch_size") * devices * accumulated)

    @property
    def num_images(self) -> int:
        """Number of images seen in training."""
        return self.num_steps * self.images_per_step

    def setting(self, path: str) -> Any:  # noqa: ANN401
        """Return a setting by its dotted path; None if missing."""
        value: Any = self.settings
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return None
            value = value[key]
        return value

    def fits(self, conditions: Sequence[Mapping[str, object]]) -> bool:
        """Whether the settings match one of the conditions."""
        return any(
            all(self.setting(path) == value for path, value in condition.items())
            for condition in conditions
        )

    def value(self, quantity: Quantity) -> float | None:
        """Return a quantity; None if it was not logged."""
        if quantity.metric == "finite":
            return float(self.is_finite)
        if quantity.metric == "hours":
            return self._hours()
        if quantity.metric == "images":
            return float(self.num_images)
        if quantity.metric == "teraflop":
            flops = self.flops_per_image()
            return None if flops is None else self.num_images * flops / 1e12
        names = sorted({n for row in self.rows for n in row if fnmatchcase(n, quantity.metric)})
        values = [self._over_rows(name, quantity.over) for name in names]
        if not values:
            return None
        if quantity.each == "count":
            return float(len(values))
        if quantity.each == "zeros":
            return float(sum(value == 0.0 for value in values))
        total = sum(values)
        if not quantity.in_bits:
            return total
        image = self.settings["dataset"]["image"]
        return float(bits_per_dim(total, image["channels"] * image["size"] ** 2))

    def _over_rows(self, name: str, over: Over) -> float:
        rows = [row for row in self.rows if name in row]
        values = [row[name] for row in rows]
        if over in ("end", "late_max"):
            first = (1.0 - _END if over == "end" else 0.5) * self.num_steps
            values = [row[name] for row in rows if row["step"] >= first] or values[-1:]
        combine: dict[Over, Callable[[Sequence[float]], float]] = {
            "last": lambda values: values[-1],
            "end": statistics.fmean,
            "median": statistics.median,
            "late_max": max,
        }
        return combine[over](values)

    def _hours(self) -> float | None:
        """Return the duration of the steps from the logged speeds, without validation."""
        seconds, done = 0.0, 0
        for row in self.rows:
            if "train/images_per_second" in row:
                num_steps = int(row["step"]) + 1 - done
                seconds += num_steps * self.images_per_step / row["train/images_per_second"]
                done += num_steps
        return seconds / 3600 * self.num_steps / done if done else None


def shown(value: object) -> str:
    """Format a setting or a published number."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return " + ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def listed(values: Sequence[object]) -> str:
    """Format several values."""
    return ", ".join(map(shown, values))
