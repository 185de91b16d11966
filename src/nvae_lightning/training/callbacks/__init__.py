"""What watches a training: checkpoints, guards, pictures, and what is printed and logged."""

from nvae_lightning.training.callbacks.checkpoint import (
    AtomicCheckpointIO,
    Checkpoint,
    last_checkpoint,
    read_checkpoint,
    verify_checkpoint,
)
from nvae_lightning.training.callbacks.ema import EMA
from nvae_lightning.training.callbacks.frechet import FrechetDistance
from nvae_lightning.training.callbacks.guard import DivergedError, Guard
from nvae_lightning.training.callbacks.heartbeat import Heartbeat
from nvae_lightning.training.callbacks.kl_per_group import KLPerGroup
from nvae_lightning.training.callbacks.peak_memory import PeakMemory
from nvae_lightning.training.callbacks.pictures import Pictures
from nvae_lightning.training.callbacks.preemption import EndRanks, Preemption, requeued_at_sigusr1
from nvae_lightning.training.callbacks.resumption import Resumption
from nvae_lightning.training.callbacks.sampling_speed import SamplingSpeed
from nvae_lightning.training.callbacks.summary import Summary
from nvae_lightning.training.callbacks.temperatures import Temperatures
from nvae_lightning.training.callbacks.throughput import Throughput
from nvae_lightning.training.callbacks.wandb_run import FinishWandb, start_wandb
from nvae_lightning.training.csv_logger import ResumableCSVLogger

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
