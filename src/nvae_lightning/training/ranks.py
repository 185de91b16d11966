"""The trainer of all commands, and its ranks."""

from __future__ import annotations

import inspect
import os
from datetime import timedelta
from typing import Any, Literal

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.training.callbacks import Heartbeat


def make_trainer(
    *,
    timeout_minutes: int | float,
    sync_batchnorm_scope: Literal["all", "node"] = "all",
    **settings: Any,
) -> Trainer:
    """Build Lightning's trainer; it ends all ranks if one of them stops answering.

    Args:
        timeout_minutes: Time without an answer of a rank after which the others end.
        sync_batchnorm_scope: Ranks that share the statistics of batch normalisation: ``all``, or
            those of each ``node``.
        settings: Arguments of the trainer.

    Raises:
        ValueError: If the time is not positive, the strategy forks or spawns its ranks, or
            torchrun has started another number of ranks.
    """
    if isinstance(timeout_minutes, bool | str) or not timeout_minutes > 0:
        raise ValueError(
            f"trainer.timeout_minutes must be a positive number, got {timeout_minutes!r}"
        )
    strategy = settings.get("strategy")
    if str(strategy).startswith(("ddp_fork", "ddp_spawn", "ddp_notebook")):
        raise ValueError(
            f"trainer.strategy: got {strategy}, whose ranks do not return the trained weights; "
            "set trainer.strategy=ddp"
        )
    is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if is_torchrun and settings.get("devices", "auto") == "auto":
        settings["devices"] = int(os.environ["LOCAL_WORLD_SIZE"])
    trainer = Trainer(**settings)
    num_ranks = trainer.num_devices * trainer.num_nodes
    started = os.environ["WORLD_SIZE"] if is_torchrun else None
    if started is not None and int(started) != num_ranks:
        raise ValueError(
            f"trainer.devices: got {trainer.num_devices} on trainer.num_nodes={trainer.num_nodes}"
            f", but torchrun has started {started} processes; set trainer.devices=auto and "
            "trainer.num_nodes to the number of machines"
        )
    if trainer.world_size > 1:
        callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        callbacks.insert(0, Heartbeat(timeout_minutes))
        if sync_batchnorm_scope == "node":
            callbacks.insert(1, _StatisticsPerNode())
        if isinstance(strategy := trainer.strategy, DDPStrategy) and strategy._timeout:
            # Collectives must not time out before the heartbeat has named the rank.
            strategy._timeout = max(strategy._timeout, timedelta(minutes=2 * timeout_minutes))
    return trainer


class _StatisticsPerNode(Callback):
    """Share the statistics of batch normalisation among the ranks of each node only."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        BatchNorm.group, _ = torch.distributed.new_subgroups(trainer.num_devices)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        BatchNorm.group = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        BatchNorm.group = None


def _signature() -> inspect.Signature:
    """Return Lightning's signature with our own settings, for the checks of settings."""
    own = inspect.signature(make_trainer, eval_str=True).parameters.values()
    lightnings = inspect.signature(Trainer, eval_str=True).parameters.values()
    return inspect.Signature([*lightnings, *(p for p in own if p.kind is p.KEYWORD_ONLY)])


setattr(make_trainer, "__signature__", _signature())  # noqa: B010 -- unknown to type checkers
