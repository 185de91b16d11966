"""Lightning callbacks: checkpoints, guards, pictures, measurements."""

from nvae_lightning.training.callbacks.checkpoint import Checkpoint
from nvae_lightning.training.callbacks.ema import EMA
from nvae_lightning.training.callbacks.frechet import FrechetDistance
from nvae_lightning.training.callbacks.guard import Guard
from nvae_lightning.training.callbacks.heartbeat import Heartbeat
from nvae_lightning.training.callbacks.kl_per_group import KLPerGroup
from nvae_lightning.training.callbacks.peak_memory import PeakMemory
from nvae_lightning.training.callbacks.pictures import Pictures
from nvae_lightning.training.callbacks.preemption import EndRanks, Preemption
from nvae_lightning.training.callbacks.resumption import Resumption
from nvae_lightning.training.callbacks.summary import Summary
from nvae_lightning.training.callbacks.temperatures import Temperatures
from nvae_lightning.training.callbacks.throughput import Throughput
from nvae_lightning.training.callbacks.wandb_run import FinishWandb, start_wandb

__all__ = [
    "EMA",
    "Checkpoint",
    "EndRanks",
    "FinishWandb",
    "FrechetDistance",
    "Guard",
    "Heartbeat",
    "KLPerGroup",
    "PeakMemory",
    "Pictures",
    "Preemption",
    "Resumption",
    "Summary",
    "Temperatures",
    "Throughput",
    "start_wandb",
]
