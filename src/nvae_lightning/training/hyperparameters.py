"""Arguments of a training as plain data in its checkpoints, and back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from nvae_lightning.objective import KL, Penalty, constant, kl_warmup, size_factor
from nvae_lightning.serialization.architecture import describe, restore_value
from nvae_lightning.utilities.plain_data import check_plain

#: Where a checkpoint holds them.
HYPERPARAMETERS = "hyperparameters"

_NAMES = (
    "kl", "penalty", "optimizer", "final_learning_rate", "warmup_epochs", "num_importance_samples",
)  # fmt: skip

#: What data may name: no other function or class is called.
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
    """Turn the objective and the optimiser of a module into plain data."""
    return describe({name: getattr(module, name) for name in _NAMES})


def restore_training(description: object, given: Mapping[str, object]) -> dict[str, Any]:
    """Turn what :func:`describe_training` gave into arguments of the module.

    Nothing that the data name is called unless this package or ``torch.optim`` has it. For the
    rest, which keeps its default, a warning says what to give.

    Args:
        description: The data; None in checkpoints of earlier versions, which have none.
        given: Arguments to take instead of those described.

    Raises:
        ValueError: If the data are damaged.
    """
    if description is None:
        return dict(given)
    if not isinstance(description, Mapping):
        raise ValueError(f"no description of a training ({type(description).__name__})")
    try:
        check_plain({name: value for name, value in description.items() if name not in given})
    except ValueError as error:
        raise ValueError(f"no description of a training ({error})") from error
    arguments: dict[str, Any] = {}
    for name in _NAMES:
        if name in given or name not in description:
            continue
        try:
            arguments[name] = _restore(name, description[name])
        except LookupError as error:
            warnings.warn(
                f"{error.args[0]}: the checkpoint names {error.args[1]!r}, which is not of this "
                f"package or torch.optim, so that the default is taken; give it as {name}=…",
                stacklevel=4,
            )
        except (TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{name}: no description of a training ({error!r})") from error
    return {**arguments, **given}


def _restore(name: str, value: Any) -> Any:  # noqa: ANN401
    if name == "kl":
        return KL(**{k: restore_value(f"{name}.{k}", v, _KNOWN) for k, v in value.items()})
    if name == "penalty":
        return Penalty(**value)
    return restore_value(name, value, _KNOWN)
