"""Results of a measurement."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Column, Table

from nvae_lightning.benchmarking.roofline import Cost, Roofline
from nvae_lightning.benchmarking.work import Rounds


@dataclass(frozen=True)
class Result:
    """Measurements of one setting.

    Args:
        label: Overrides that distinguish the setting.
        device: Name of the device.
        precision: Lightning's name of the precision.
        batch_size: Number of images per step.
        rounds: Times and memory.
        cost: Computations and memory traffic of a step.
        roofline: Peak performance of the device.
        largest_batch: Largest batch size that fits in memory; None if not searched for.
    """

    label: str
    device: str
    precision: str
    batch_size: int
    rounds: Rounds
    cost: Cost
    roofline: Roofline
    largest_batch: int | None

    @property
    def rates(self) -> list[float]:
        """Images per second of each round."""
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
    def least_ms_per_image(self) -> float:
        """Milliseconds per image at the roofline."""
        return 1e3 * self.roofline.seconds(self.cost) / self.batch_size

    @property
    def fraction(self) -> float:
        """Time at the roofline over measured time, at most about 1."""
        return self.least_ms_per_image / self.ms_per_image

    @property
    def bytes_per_image(self) -> float:
        """Peak bytes of the tensors that a step allocates and frees again."""
        memory = self.rounds.memory
        return (memory.tensors - memory.kept) / self.batch_size

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        memory, cost, roofline = self.rounds.memory, self.cost, self.roofline
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
            "roofline": {
                "gflop_per_image": cost.flops / self.batch_size / 1e9,
                "megabytes_per_image": cost.bytes / self.batch_size / 1e6,
                "gflop_per_second": roofline.flops_per_second / 1e9,
                "gigabytes_per_second": roofline.bytes_per_second / 1e9,
                "ms_per_image": self.least_ms_per_image,
                "fraction": self.fraction,
            },
        }


def compare_speeds(first: Result, second: Result) -> dict[str, Any]:
    """Return the second's speed over the first's, round by round, with median and range."""
    ratios = [b / a for a, b in zip(first.rates, second.rates, strict=True)]
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "of_rounds": ratios,
    }


def tabulate(what: str, results: Sequence[Result]) -> Table:
    """Format results as a table with a column per setting."""
    columns = [Column(result.label, overflow="fold") for result in results]
    table = Table(f"{what}, {results[0].device}", *columns)
    rows: dict[str, Callable[[Result], str]] = {
        "images per second": lambda r: f"{r.images_per_second:.4g}",
        "ms per image": lambda r: f"{r.ms_per_image:.4g}",
        **{
            f"  {phase}": lambda r, phase=phase: f"{r.phases[phase]:.4g}"
            for phase in results[0].phases
        },
        "roofline, ms per image": lambda r: f"{r.least_ms_per_image:.4g}",
        "share of the roofline": lambda r: f"{r.fraction:.1%}",
        "MiB per image": lambda r: f"{r.bytes_per_image / 2**20:.4g}",
        "MiB kept": lambda r: f"{r.rounds.memory.kept / 2**20:.4g}",
        "MiB resident": lambda r: f"{r.rounds.memory.resident / 2**20:.4g}",
        "warm-up, s": lambda r: f"{r.rounds.warmup_seconds:.3g}",
    }
    if results[0].largest_batch is not None:
        rows["largest batch"] = lambda r: str(r.largest_batch)
    for name, cell in rows.items():
        table.add_row(name, *map(cell, results))
    return table
