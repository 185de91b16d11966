"""What watches a training: pictures, rate per group, throughput, the closing summary."""

from nvae_lightning.callbacks.kl_per_group import KLPerGroup
from nvae_lightning.callbacks.pictures import Pictures
from nvae_lightning.callbacks.summary import Summary
from nvae_lightning.callbacks.throughput import Throughput
from nvae_lightning.callbacks.wandb import FinishWandb

__all__ = ["FinishWandb", "KLPerGroup", "Pictures", "Summary", "Throughput"]
