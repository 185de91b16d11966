"""Speed and memory of training and using a model, against what the machine could do."""

from nvae_lightning.benchmarking.images import RandomImages
from nvae_lightning.benchmarking.memory_use import Memory, largest_batch, profile_steps
from nvae_lightning.benchmarking.results import Ratio, Result
from nvae_lightning.benchmarking.roofline import Cost, Roof, cost_of, measure_roof
from nvae_lightning.benchmarking.rounds import Rounds, alternate
from nvae_lightning.benchmarking.work import Loading, Repetition, Times, Training, Work

__all__ = [
    "Cost",
    "Loading",
    "Memory",
    "RandomImages",
    "Ratio",
    "Repetition",
    "Result",
    "Roof",
    "Rounds",
    "Times",
    "Training",
    "Work",
    "alternate",
    "cost_of",
    "largest_batch",
    "measure_roof",
    "profile_steps",
]
