"""A model's constructor arguments as plain data, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any

from torch import nn

from nvae_lightning.model.cells import DepthwiseCell, RegularCell
from nvae_lightning.model.earlier_names import rename_constructors
from nvae_lightning.model.hierarchy import Hierarchy, Image, Scale
from nvae_lightning.model.layers import DataDependentConv2d, WeightNormConv2d
from nvae_lightning.model.likelihood import (
    BernoulliLikelihood,
    DiscretizedLogisticMixtureLikelihood,
    NormalLikelihood,
)
from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.utilities.plain_data import check_plain, fits, shown

#: Where a training's checkpoint holds the description of its model.
ARCHITECTURE = "architecture"

_CONSTRUCTOR = "constructor"

#: Arguments of a convolution that data may give; the others are the cell's to say.
_OF_CONVOLUTIONS = {"groups": int, "bias": bool, "padding_mode": str}

#: What data may name. Anything else has to be given by who reads them, so that nothing is run.
_KNOWN: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        RegularCell,
        DepthwiseCell,
        BatchNorm,
        nn.Identity,
        nn.SiLU,
        nn.ELU,
        WeightNormConv2d,
        DataDependentConv2d,
        nn.Conv2d,
        BernoulliLikelihood,
        DiscretizedLogisticMixtureLikelihood,
        NormalLikelihood,
    )
}


class ForeignConstructorError(ValueError):
    """A description names a constructor that is not of this package.

    Args:
        place: which part of the model it is to build, as ``encoder_cell.normalization``.
        constructor: its name there.
    """

    def __init__(self, place: str, constructor: object) -> None:
        self.place = place if place.isprintable() else shown(place)
        self.argument = self.place.partition(".")[0]
        self.constructor = constructor
        super().__init__(
            f"{self.place} is {shown(constructor)}, which is not of this package: give it as "
            f"{self.argument}=CONSTRUCTOR"
        )


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
    if not isinstance(description, Mapping):
        raise ValueError(f"no description of a model (it is {shown(description)})")
    description = {name: value for name, value in description.items() if name not in given}
    try:
        check_plain(description)
    except ValueError as error:
        raise ValueError(f"no description of a model ({error})") from error
    arguments = {name: _restore(name, value) for name, value in description.items()}
    try:
        if "image" not in given:
            arguments["image"] = _build("image", Image, arguments["image"])
        if "hierarchy" not in given:
            hierarchy = {**arguments["hierarchy"]}
            scales = [_build("scales", Scale, scale) for scale in hierarchy.pop("scales")]
            hierarchy = {**hierarchy, "scales": tuple(scales)}
            arguments["hierarchy"] = _build("hierarchy", Hierarchy, hierarchy)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no description of a model ({error!r})") from error
    return {**arguments, **given}


def check_arguments(place: str, kind: Callable[..., Any], arguments: Mapping[str, object]) -> None:
    """Compare arguments of a constructor, as data give them, with the types that it declares.

    Args:
        place: what it is to build, for the error; empty for the model.
        kind: the constructor, a class or a function.
        arguments: its arguments; those that it does not know are left to calling it.

    Raises:
        ValueError: if one is of another type.
    """
    is_class = isinstance(kind, type)
    if is_class and issubclass(kind, nn.Conv2d):
        if unknown := arguments.keys() - _OF_CONVOLUTIONS:
            raise ValueError(f"{place} has {shown(min(unknown))}, which is not for data to say")
        declared: Mapping[str, object] = _OF_CONVOLUTIONS
    else:
        parameters = inspect.signature(
            kind.__init__ if is_class else kind, eval_str=True
        ).parameters
        declared = {name: parameter.annotation for name, parameter in parameters.items()}
    for name, value in arguments.items():
        if name in declared and not fits(value, declared[name]):
            where = f"{place}.{name}".lstrip(".")
            raise ValueError(f"{where} is {shown(value)}, which is of another type than it takes")


def _build(place: str, kind: type, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401
    check_arguments(place, kind, arguments)
    return kind(**arguments)


def _restore(name: str, value: Any) -> Any:  # noqa: ANN401
    try:
        return restore_value(name, value, _KNOWN)
    except LookupError as error:
        raise ForeignConstructorError(*error.args) from error


def restore_value(name: str, value: Any, known: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Turn one described value back.

    Args:
        name: place of the value.
        value: the data, which :func:`check_plain` has seen.
        known: constructors by the names that data may give them.

    Raises:
        LookupError: if the data name another constructor; of its place and name.
        ValueError: if an argument of a constructor is of another type than it takes.
    """
    if isinstance(value, list | tuple):
        return [restore_value(name, item, known) for item in value]
    if not isinstance(value, dict) or _CONSTRUCTOR not in value:
        return value
    arguments = rename_constructors(value)
    constructor = arguments.pop(_CONSTRUCTOR)
    if not isinstance(constructor, str) or constructor not in known:
        raise LookupError(name, constructor)
    kind = known[constructor]
    arguments = {k: restore_value(f"{name}.{k}", v, known) for k, v in arguments.items()}
    check_arguments(name, kind, arguments)
    return partial(kind, **arguments) if arguments else kind
