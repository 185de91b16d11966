"""A model's constructor arguments as plain data, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any

from torch import nn

from nvae_lightning.model.cells import DepthwiseCell, RegularCell
from nvae_lightning.model.hierarchy import Hierarchy, Image, Scale
from nvae_lightning.model.layers import (
    BatchNormELU,
    BatchNormSwish,
    DataDependentConv2d,
    ELUOnly,
    WeightNormConv2d,
)
from nvae_lightning.model.likelihood import (
    BernoulliLikelihood,
    DiscretizedLogisticMixtureLikelihood,
    NormalLikelihood,
)

#: Where a training's checkpoint holds the description of its model.
ARCHITECTURE = "architecture"

_CONSTRUCTOR = "constructor"

#: What data may name. Anything else has to be given by who reads them, so that nothing is run.
_KNOWN: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        RegularCell,
        DepthwiseCell,
        BatchNormSwish,
        BatchNormELU,
        ELUOnly,
        WeightNormConv2d,
        DataDependentConv2d,
        nn.Conv2d,
        BernoulliLikelihood,
        DiscretizedLogisticMixtureLikelihood,
        NormalLikelihood,
    )
}


def describe(arguments: Mapping[str, object]) -> dict[str, Any]:
    """Turn constructor arguments into what JSON can hold.

    A constructor, or a ``functools.partial`` of one, becomes its name and its arguments; of any
    other object only its class is named, as a checkpoint that held it could not be read again.
    """
    return {name: _describe(value) for name, value in arguments.items()}


def _describe(value: Any) -> Any:  # noqa: ANN401
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # enumerations of them, too
        return str.__str__(value)
    if isinstance(value, Real):  # NumPy's numbers, too
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Mapping):
        return describe(value)
    if isinstance(value, Sequence):
        return [_describe(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return describe(asdict(value))
    if isinstance(value, partial):
        return {**_describe(value.func), **describe(value.keywords)}
    name = getattr(value, "__qualname__", type(value).__qualname__)
    module = getattr(value, "__module__", None) or type(value).__module__
    return {_CONSTRUCTOR: name if _KNOWN.get(name) is value else f"{module}.{name}"}


def restore(
    description: Any,  # noqa: ANN401
    given: Mapping[str, object],
) -> dict[str, Any]:
    """Turn what :func:`describe` gave into constructor arguments.

    Args:
        description: the data.
        given: arguments to take instead of those described.

    Raises:
        ValueError: if the data are not such, or name a constructor that is not of this package.
    """
    try:
        image = Image(**description["image"])
        hierarchy = {**description["hierarchy"]}
        scales = tuple(Scale(**scale) for scale in hierarchy.pop("scales"))
        arguments = {
            **{k: _restore(k, v) for k, v in description.items() if k not in given},
            "image": image,
            "hierarchy": Hierarchy(scales=scales, **hierarchy),
        }
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no description of a model ({error!r})") from error
    return {**arguments, **given}


def _restore(name: str, value: Any) -> Any:  # noqa: ANN401
    try:
        return restore_value(name, value, _KNOWN)
    except LookupError as error:
        place, constructor = error.args
        raise ValueError(
            f"{place} is {constructor!r}, which is not of this package: give it as "
            f"{name}=CONSTRUCTOR"
        ) from error


def restore_value(name: str, value: Any, known: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Turn one described value back.

    Args:
        name: place of the value.
        value: the data.
        known: constructors by the names that data may give them.

    Raises:
        LookupError: if the data name another constructor; of its place and name.
    """
    if isinstance(value, list):
        return [restore_value(name, item, known) for item in value]
    if not isinstance(value, dict) or _CONSTRUCTOR not in value:
        return value
    arguments = dict(value)
    constructor = arguments.pop(_CONSTRUCTOR)
    if constructor not in known:
        raise LookupError(name, constructor)
    kind = known[constructor]
    arguments = {k: restore_value(f"{name}.{k}", v, known) for k, v in arguments.items()}
    return partial(kind, **arguments) if arguments else kind
