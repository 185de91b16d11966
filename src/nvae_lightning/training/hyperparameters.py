"""Hyperparameters of a training: their checks, and their description in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nvae_lightning.objective import KL, Penalty, constant, kl_warmup, size_factor
from nvae_lightning.serialization.architecture import describe, restore_value
from nvae_lightning.utilities.plain_data import check_plain

#: Key of the description in a checkpoint.
HYPERPARAMETERS = "hyperparameters"

_NAMES = (
    "kl", "penalty", "optimizer", "final_learning_rate", "warmup_epochs", "num_importance_samples",
)  # fmt: skip

#: Functions and classes that a description may name; no others are called.
_KNOWN: dict[str, Any] = {
    f"{known.__module__}.{known.__qualname__}": known
    for known in (
        kl_warmup,
        constant,
        size_factor,
        *(
            kind
            for kind in vars(torch.optim).values()
            if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        ),
    )
}


def describe_training(module: object) -> dict[str, Any]:
    """Describe the objective and the optimiser of a module as plain data."""
    return describe({name: getattr(module, name) for name in _NAMES})


def restore_training(description: Any, given: Mapping[str, object]) -> dict[str, Any]:  # noqa: ANN401
    """Turn a description by :func:`describe_training` into arguments of the module.

    Only constructors of this package and of ``torch.optim`` are called.

    Args:
        description: Plain data.
        given: Arguments that replace described ones.

    Raises:
        ValueError: If the description is damaged or names another constructor.
    """
    try:
        described = {n: description[n] for n in _NAMES if n in description and n not in given}
        check_plain(described)
        return {**{name: _restore(name, value) for name, value in described.items()}, **given}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not the description of a training ({error!r})") from error


def _restore(name: str, value: Any) -> Any:  # noqa: ANN401
    if name == "kl":
        return KL(**{k: restore_value(f"{name}.{k}", v, _KNOWN) for k, v in value.items()})
    if name == "penalty":
        return Penalty(**value)
    return restore_value(name, value, _KNOWN)


def check_optimizer(constructor: Callable[..., torch.optim.Optimizer]) -> None:
    """Build the optimiser once, to report a bad setting before the training begins.

    Raises:
        ValueError: If a number is out of range.
    """
    settings: dict[str, object] = getattr(constructor, "keywords", {})
    given = ", ".join(f"optimizer.{name}={value}" for name, value in settings.items())
    try:
        optimizer = constructor([torch.nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{given}: {error}") from error
    if not 0.0 < optimizer.param_groups[0]["lr"] < math.inf:
        raise ValueError(f"{given}: lr must be positive and finite")
