"""The trainer of all commands, and its ranks."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from nvae_lightning.training.callbacks import Heartbeat


def strategy_of_a_command(strategy: object) -> object:
    """Return the strategy to use; warn if it differs from the one that is set.

    Forked or spawned ranks would not return the trained weights to the command.

    >>> strategy_of_a_command("ddp_find_unused_parameters_true")
    'ddp_find_unused_parameters_true'
    """
    found = re.fullmatch(
        r"ddp_(?:forkserver|fork|spawn|notebook)(_find_unused_parameters_(?:true|false))?",
        str(strategy).lower(),
    )
    if found is None:
        return strategy
    used = f"ddp{found[1] or ''}"
    rank_zero_warn(
        f"trainer.strategy: got {strategy}, but {used} is used instead: the command launches the "
        "ranks itself"
    )
    return used


def devices_of_a_command(devices: object, environment: Mapping[str, str] = os.environ) -> object:
    """Return the devices to use; ``auto`` means one for each process of torchrun.

    >>> devices_of_a_command("auto", {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2"})
    2
    """
    if devices == "auto" and "TORCHELASTIC_RUN_ID" in environment:
        return int(environment["LOCAL_WORLD_SIZE"])
    return devices


def make_trainer(*, timeout_minutes: int | float, **settings: Any) -> Trainer:
    """Build Lightning's trainer; it ends all ranks if one of them stops answering.

    Args:
        timeout_minutes: Time without an answer of a rank after which the others end.
        settings: Arguments of the trainer.

    Raises:
        ValueError: If the time is not positive, or torchrun has started another number of ranks.
    """
    if isinstance(timeout_minutes, bool | str) or not timeout_minutes > 0:
        raise ValueError(
            f"trainer.timeout_minutes must be a positive number, got {timeout_minutes!r}"
        )
    settings["strategy"] = strategy_of_a_command(settings.get("strategy", "auto"))
    settings["devices"] = devices_of_a_command(settings.get("devices", "auto"))
    trainer = Trainer(**settings)
    num_ranks = trainer.num_devices * trainer.num_nodes
    started = os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
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
