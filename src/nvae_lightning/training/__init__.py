"""Training with Lightning: the module, its callbacks, its trainer."""

from nvae_lightning.training.module import NVAEModule

__all__ = ["NVAEModule"]
