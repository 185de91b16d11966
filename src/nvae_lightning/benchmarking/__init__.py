"""Speed and memory of training and using a model, compared with the device's roofline."""

from nvae_lightning.benchmarking.images import RandomImages
from nvae_lightning.benchmarking.memory_use import Memory, largest_batch
from nvae_lightning.benchmarking.profiler import write_trace
from nvae_lightning.benchmarking.results import Result, compare_speeds, tabulate
from nvae_lightning.benchmarking.roofline import Cost, Roofline, cost_of, measure_roofline
from nvae_lightning.benchmarking.work import (
    Loading,
    Repetition,
    Rounds,
    Times,
    Training,
    Work,
    alternate,
)

__all__ = [
    "Cost",
    "Loading",
    "Memory",
    "RandomImages",
    "Repetition",
    "Result",
    "Roofline",
    "Rounds",
    "Times",
    "Training",
    "Work",
    "alternate",
    "compare_speeds",
    "cost_of",
    "largest_batch",
    "measure_roofline",
    "tabulate",
    "write_trace",
]
