"""A model's constructor arguments as plain data, and back."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import cache, partial
from importlib import import_module
from numbers import Integral, Real
from typing import Any

from torch import nn

import nvae_lightning.model
from nvae_lightning.model.cells import ResidualCell
from nvae_lightning.model.hierarchy import Hierarchy, Scale
from nvae_lightning.utilities.image import Image
from nvae_lightning.utilities.plain_data import check_plain, misfit, shown

#: Key of the model's description in a training checkpoint.
ARCHITECTURE = "architecture"

_CONSTRUCTOR = "constructor"

#: Arguments of a convolution that data may set; the cell sets the others.
_OF_CONVOLUTIONS = {"groups": int, "bias": bool, "padding_mode": str}

_OF_TORCH = (nn.Identity, nn.SiLU, nn.ELU, nn.Conv2d)

#: Normalisation and activation that earlier descriptions named together.
_PAIRS = {
    "BatchNormSwish": ("BatchNorm", "SiLU"),
    "BatchNormELU": ("BatchNorm", "ELU"),
    "ELUOnly": ("Identity", "ELU"),
}


@cache
def known_constructors() -> dict[str, type[nn.Module]]:
    """Find the constructors that data may name: modules of ``model/`` and a few of torch's.

    A class counts if it is public and defined in the module itself. Names are looked up in this
    table and never imported, so a description cannot run other code.
    """
    known: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in _OF_TORCH}
    package = nvae_lightning.model
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for name, value in vars(import_module(found.name)).items():
            is_own = getattr(value, "__module__", None) == found.name and name[0] != "_"
            if is_own and inspect.isclass(value) and issubclass(value, nn.Module):
                known[name] = value
    return known


def describe(arguments: Mapping[str, object]) -> dict[str, Any]:
    """Turn constructor arguments into JSON-compatible data.

    A constructor, or a ``functools.partial`` of one, becomes its name and its arguments. Any other
    object becomes the name of its class, so that checkpoints stay plain data.
    """
    return {name: _describe(value) for name, value in arguments.items()}


def _describe(value: Any) -> Any:  # noqa: ANN401
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # including enumerations of strings
        return str.__str__(value)
    if isinstance(value, Real):  # including NumPy's
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
    is_known = known_constructors().get(name) is value
    return {_CONSTRUCTOR: name if is_known else f"{module}.{name}"}


def restore(
    description: Any,  # noqa: ANN401
    given: Mapping[str, object],
) -> dict[str, Any]:
    """Turn the output of :func:`describe` into constructor arguments.

    Args:
        description: Output of :func:`describe`.
        given: Arguments that replace described ones.

    Raises:
        ValueError: If the data are not a description of a model, or name a constructor that is
            not part of this package.
    """
    try:
        described = {name: value for name, value in description.items() if name not in given}
        check_plain(described)
        known = known_constructors()
        arguments = {name: restore_value(name, v, known) for name, v in described.items()}
        if "image" not in given:
            arguments["image"] = _build("image", Image, arguments["image"])
        if "hierarchy" not in given:
            hierarchy = {**arguments["hierarchy"]}
            scales = [_build("scales", Scale, scale) for scale in hierarchy.pop("scales")]
            hierarchy = {**hierarchy, "scales": tuple(scales)}
            arguments["hierarchy"] = _build("hierarchy", Hierarchy, hierarchy)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the description of a model ({error!r})") from error
    return {**arguments, **given}


def check_arguments(place: str, kind: Callable[..., Any], arguments: Mapping[str, object]) -> None:
    """Compare arguments from plain data with the types that a constructor declares.

    Args:
        place: Part of the model that is built, for the message; empty for the model itself.
        kind: Class or function that is called.
        arguments: Its arguments. Unknown names are left for the call to report.

    Raises:
        ValueError: If an argument has another type.
    """
    is_class = isinstance(kind, type)
    if is_class and issubclass(kind, nn.Conv2d):
        if unknown := arguments.keys() - _OF_CONVOLUTIONS:
            raise ValueError(f"{place} sets {shown(min(unknown))}, which a description may not")
        declared: Mapping[str, object] = _OF_CONVOLUTIONS
    else:
        parameters = inspect.signature(
            kind.__init__ if is_class else kind, eval_str=True
        ).parameters
        declared = {name: parameter.annotation for name, parameter in parameters.items()}
    for name, value in arguments.items():
        if name in declared and misfit(value, declared[name]):
            where = f"{place}.{name}".lstrip(".")
            raise ValueError(f"{where} is {shown(value)}, which has the wrong type")


def _build(place: str, kind: type, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401
    check_arguments(place, kind, arguments)
    return kind(**arguments)


def restore_value(name: str, value: Any, known: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Restore one described value.

    Args:
        name: Place of the value.
        value: Data that passed :func:`check_plain`.
        known: Constructors by the names that data may use.

    Raises:
        ValueError: If the data name another constructor, an argument of a constructor has the
            wrong type, or a cell is part of a cell: nesting them could build without limit.
    """
    if isinstance(value, list | tuple):
        return [restore_value(name, item, known) for item in value]
    if not isinstance(value, dict) or _CONSTRUCTOR not in value:
        return value
    arguments = _split_pair(value)
    constructor = arguments.pop(_CONSTRUCTOR)
    if not isinstance(constructor, str) or constructor not in known:
        place = name if name.isprintable() else shown(name)
        argument = place.partition(".")[0]
        raise ValueError(
            f"{place} is {shown(constructor)}, which is not part of this package and is never "
            f"imported because a file names it; pass it as {argument}=CONSTRUCTOR, or to a "
            "command as described by its --help"
        )
    kind = known[constructor]
    if "." in name and isinstance(kind, type) and issubclass(kind, ResidualCell):
        raise ValueError(f"{name} is {constructor}, but a cell cannot be part of a cell")
    arguments = {k: restore_value(f"{name}.{k}", v, known) for k, v in arguments.items()}
    check_arguments(name, kind, arguments)
    return partial(kind, **arguments) if arguments else kind


def _split_pair(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Split the combined names of earlier descriptions into normalisation and activation."""
    pair = cell.get("normalization")
    name = pair.get(_CONSTRUCTOR) if isinstance(pair, Mapping) else None
    if not isinstance(name, str) or name not in _PAIRS:
        return dict(cell)
    norm, activation = ({_CONSTRUCTOR: part} for part in _PAIRS[name])
    return {**cell, "normalization": norm, "activation": activation}
