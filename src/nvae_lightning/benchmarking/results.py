"""What came of a measurement."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nvae_lightning.benchmarking.roofline import Cost, Roof
from nvae_lightning.benchmarking.rounds import Rounds


@dataclass(frozen=True)
class Result:
    """Of one setting.

    Args:
        label: tells the settings apart.
        device: name of what it was measured on.
        precision: Lightning's name of the number format.
        batch_size: images of a step.
        rounds: what was measured.
        cost: what a step takes on any device.
        roof: what the device can do.
        largest_batch: images of a step that fit into its memory; None if not looked for.
    """

    label: str
    device: str
    precision: str
    batch_size: int
    rounds: Rounds
    cost: Cost
    roof: Roof
    largest_batch: int | None

    @property
    def rates(self) -> list[float]:
        """Images a second, of each round."""
        return [self.batch_size / times.step for times in self.rounds.times]

    @property
    def images_per_second(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.rates)

    @property
    def ms_per_image(self) -> float:
        """Median over the rounds."""
        return 1e3 / self.images_per_second

    @property
    def phases(self) -> dict[str, float]:
        """Milliseconds per image of each phase, medians over the rounds."""
        times = self.rounds.times
        return {
            phase: 1e3 * statistics.median(t.phases[phase] for t in times) / self.batch_size
            for phase in times[0].phases
        }

    @property
    def floor(self) -> float:
        """Least milliseconds per image."""
        return 1e3 * self.roof.seconds(self.cost) / self.batch_size

    @property
    def fraction(self) -> float:
        """Least time over measured time: 1 is all that the device can do."""
        return self.floor / self.ms_per_image

    @property
    def bytes_per_image(self) -> float:
        """Tensors that a step makes and frees again, at their most."""
        memory = self.rounds.memory
        return (memory.tensors - memory.kept) / self.batch_size

    def as_dict(self) -> dict[str, Any]:
        """Give all as plain data."""
        memory, cost, roof = self.rounds.memory, self.cost, self.roof
        phases = self.phases
        total = sum(phases.values())
        return {
            "setting": self.label,
            "device": self.device,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "images_per_second": self.images_per_second,
            "images_per_second_of_rounds": self.rates,
            "ms_per_image": self.ms_per_image,
            "phases": {
                phase: {"ms_per_image": value, "share": value / total}
                for phase, value in phases.items()
            },
            "warmup_seconds": self.rounds.warmup_seconds,
            "first_step_seconds": self.rounds.first_step_seconds,
            "memory": {
                "peak_tensor_bytes": memory.tensors,
                "kept_tensor_bytes": memory.kept,
                "bytes_per_image": self.bytes_per_image,
                "peak_resident_bytes": memory.resident,
                "largest_batch": self.largest_batch,
            },
            "floor": {
                "gflop_per_image": cost.flops / self.batch_size / 1e9,
                "megabytes_per_image": cost.bytes / self.batch_size / 1e6,
                "gflop_per_second": roof.flops_per_second / 1e9,
                "gigabytes_per_second": roof.bytes_per_second / 1e9,
                "ms_per_image": self.floor,
                "fraction": self.fraction,
            },
        }


@dataclass(frozen=True)
class Ratio:
    """Speed of a second setting over that of the first.

    Args:
        rounds: ratio in each of the rounds that they took in turn.
    """

    rounds: Sequence[float]

    @classmethod
    def of(cls, first: Result, second: Result) -> Ratio:
        """Compare round by round."""
        return cls([b / a for a, b in zip(first.rates, second.rates, strict=True)])

    def as_dict(self) -> dict[str, Any]:
        """Give all as plain data, with median and spread."""
        return {
            "median": statistics.median(self.rounds),
            "min": min(self.rounds),
            "max": max(self.rounds),
            "of_rounds": list(self.rounds),
        }
