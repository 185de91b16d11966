"""The trainer of all commands, and its ranks."""

from __future__ import annotations

import inspect
import os
from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from nvae_lightning.training.callbacks import Heartbeat


def make_trainer(*, timeout_minutes: int | float, **settings: Any) -> Trainer:
    """Build Lightning's trainer; it ends all ranks if one of them stops answering.

    Args:
        timeout_minutes: Time without an answer of a rank after which the others end.
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
        trainer.callbacks.insert(0, Heartbeat(timeout_minutes))  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(strategy := trainer.strategy, DDPStrategy) and strategy._timeout:
            # Collectives must not time out before the heartbeat has named the rank.
            strategy._timeout = max(strategy._timeout, timedelta(minutes=2 * timeout_minutes))
    return trainer


def _signature() -> inspect.Signature:
    """Return Lightning's signature with the time-out, for the checks of settings."""
    own = inspect.signature(make_trainer, eval_str=True).parameters["timeout_minutes"]
    lightnings = inspect.signature(Trainer, eval_str=True)
    return lightnings.replace(parameters=[*lightnings.parameters.values(), own])


setattr(make_trainer, "__signature__", _signature())  # noqa: B010 -- unknown to type checkers
