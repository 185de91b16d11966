"""Hyperparameters of a training: their checks, and their description in checkpoints."""

from __future__ import annotations

import math
import warnings
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


def restore_training(description: object, given: Mapping[str, object]) -> dict[str, Any]:
    """Turn a description by :func:`describe_training` into arguments of the module.

    Only constructors of this package and of ``torch.optim`` are called. Any other is replaced with
    the default; a warning says how to set it.

    Args:
        description: Plain data, or None for early checkpoints, which have no description.
        given: Arguments that replace those described.

    Raises:
        ValueError: If the description is damaged.
    """
    if description is None:
        return dict(given)
    if not isinstance(description, Mapping):
        raise ValueError(f"not the description of a training ({type(description).__name__})")
    try:
        check_plain({name: value for name, value in description.items() if name not in given})
    except ValueError as error:
        raise ValueError(f"not the description of a training ({error})") from error
    arguments: dict[str, Any] = {}
    for name in _NAMES:
        if name in given or name not in description:
            continue
        try:
            arguments[name] = _restore(name, description[name])
        except LookupError as error:
            warnings.warn(
                f"{error.args[0]}: the checkpoint names {error.args[1]!r}, which is not of this "
                f"package or torch.optim, so the default is used; give it as {name}=…",
                stacklevel=4,
            )
        except (TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{name}: not the description of a training ({error!r})") from error
    return {**arguments, **given}


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
    try:
        defaults = constructor([torch.nn.Parameter(torch.zeros(1))]).defaults
    except (ValueError, TypeError, RuntimeError) as error:
        given = ", ".join(f"optimizer.{name}={value}" for name, value in settings.items())
        raise ValueError(f"{given}: {error}") from error
    for name, value in defaults.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not 0.0 <= value < math.inf or (name == "lr" and value == 0.0):
                raise ValueError(
                    f"optimizer.{name} must be "
                    f"{'positive' if name == 'lr' else 'at least 0'} and finite, got {value}"
                )
