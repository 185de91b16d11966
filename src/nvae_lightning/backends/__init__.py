"""Faster implementations of the model's arithmetic, applied to a model by ``Compute``."""

from nvae_lightning.backends.compute import Compute
from nvae_lightning.backends.cuda_graphs import GraphedLoss, GraphedSampler

__all__ = ["Compute", "GraphedLoss", "GraphedSampler"]
