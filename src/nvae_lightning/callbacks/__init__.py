"""What watches a training: checkpoints, guards, pictures, and what is printed and logged."""

from nvae_lightning.callbacks.checkpoint import (
    AtomicCheckpointIO,
    Checkpoint,
    last_checkpoint,
    read_checkpoint,
    verify_checkpoint,
)
from nvae_lightning.callbacks.csv_logger import ResumableCSVLogger
from nvae_lightning.callbacks.ema import EMA
from nvae_lightning.callbacks.frechet import FrechetDistance
from nvae_lightning.callbacks.guard import DivergedError, Guard
from nvae_lightning.callbacks.heartbeat import Heartbeat
from nvae_lightning.callbacks.kl_per_group import KLPerGroup
from nvae_lightning.callbacks.memory import PeakMemory
from nvae_lightning.callbacks.pictures import Pictures
from nvae_lightning.callbacks.preemption import EndRanks, Preemption, requeued_at_sigusr1
from nvae_lightning.callbacks.resumption import Resumption
from nvae_lightning.callbacks.sampling_speed import SamplingSpeed
from nvae_lightning.callbacks.summary import Summary
from nvae_lightning.callbacks.temperatures import Temperatures
from nvae_lightning.callbacks.throughput import Throughput
from nvae_lightning.callbacks.wandb import FinishWandb, start_wandb

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "Checkpoint",
    "DivergedError",
    "EndRanks",
    "FinishWandb",
    "FrechetDistance",
    "Guard",
    "Heartbeat",
    "KLPerGroup",
    "PeakMemory",
    "Pictures",
    "Preemption",
    "ResumableCSVLogger",
    "Resumption",
    "SamplingSpeed",
    "Summary",
    "Temperatures",
    "Throughput",
    "last_checkpoint",
    "read_checkpoint",
    "requeued_at_sigusr1",
    "start_wandb",
    "verify_checkpoint",
]
