"""Check settings against the parameters of the classes that they configure."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from nvae_lightning.data import ImageDataModule
from nvae_lightning.utilities.plain_data import fits, shown

_REFERENCE = re.compile(r"\$\{(\w[\w.]*)\}")
_SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a name",
    NoneType: "null",
}


def check_names(config: Any) -> None:  # noqa: ANN401 -- beartype warns of DictConfig's own bases
    """Check that every class takes the settings that it is given.

    Raises:
        ValueError: If a setting is unknown to its class.
    """
    unused = _unused(config)
    for path, node, target, parameters in _parameters(config):
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        names = [name for name in parameters if name not in ("self", "args")]
        for key in node:
            if path == "dataset" and key in unused:
                continue
            if key not in _SPECIAL and key not in parameters:
                near = difflib.get_close_matches(str(key), names, n=1)
                remedy = (
                    f"did you mean {near[0]}?"
                    if near
                    else f"it takes {', '.join(names) or 'none'}"
                )
                name = f"{path}.{key}".lstrip(".")
                raise ValueError(f"{name}: {target} takes no such setting; {remedy}")


def check_types(config: Any) -> None:  # noqa: ANN401
    """Compare all settings with the types of the parameters that they become.

    Hydra passes on what it is given, so that ``batch_size=foo`` would be noticed by whoever first
    computes with it, which may be torch in the middle of a training.

    Raises:
        ValueError: If a setting is unknown to its class, of another type, or not finite.
    """
    check_names(config)
    for path, node, _, parameters in _parameters(config):
        for key in node:
            if key not in _SPECIAL and key in parameters:
                name, value = _origin(config, f"{path}.{key}".lstrip("."))
                check_type(name, value, parameters[str(key)].annotation)


def _parameters(config: Any) -> Iterator[tuple[str, Any, str, Mapping[str, inspect.Parameter]]]:  # noqa: ANN401
    """Find all classes to instantiate: place, settings, name and parameters of each."""
    for path, node in _targets(config, ""):
        target = str(node["_target_"])
        if (parameters := _taken_by(target)) is not None:
            yield path, node, target, parameters


def build_datamodule(config: Any, *, ours: bool = False) -> Any:  # noqa: ANN401
    """Build the data module of the settings.

    Args:
        config: All settings, checked.
        ours: Whether it must be one of this package's, as for preparing or showing images.

    Raises:
        ValueError: If it is something else.
    """
    node = config.dataset.copy()
    with open_dict(node):
        for key in _unused(config):
            del node[key]
    found = instantiate(node, _convert_="all")
    expected = ImageDataModule if ours else LightningDataModule
    if not isinstance(found, expected):
        raise ValueError(
            f"dataset._target_: got {type(found).__name__}, but it must be a "
            f"{expected.__name__}; give the name of one, or see dataset=custom for a Dataset"
        )
    return found


def _taken_by(name: str) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a target; None if it cannot be read: instantiating it says why."""
    try:
        target: Any = get_object(name)
        if getattr(target, "__init__", None) is LightningDataModule.__init__:
            return {}  # it accepts anything and ignores it
        return inspect.signature(target, eval_str=True).parameters
    except (ImportError, NameError, ValueError, TypeError):
        return None


def _unused(config: Any) -> list[str]:  # noqa: ANN401
    """List settings of this package's datasets that a user's own class lacks and nobody gave."""
    node = config.get("dataset") or {}
    target = str(node.get("_target_", "nvae_lightning."))
    if target.startswith("nvae_lightning."):
        return []
    taken = _taken_by(target)
    if taken is None or any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return []
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    ours = inspect.signature(ImageDataModule).parameters
    return [
        key for key in node if key in ours and key not in taken and f"dataset.{key}" not in given
    ]


def check_type(name: str, value: object, annotation: object) -> None:
    """Compare one value with the type it should have.

    Raises:
        ValueError: If it is of another type, or not finite.

    >>> check_type("seed", 1, int)
    >>> check_type("seed", 1.5, int)
    Traceback (most recent call last):
    ValueError: seed: got 1.5, but it must be a whole number
    """
    if _fits(value, annotation):
        return
    is_flag = value is None or isinstance(value, bool)
    given = json.dumps(value) if is_flag else shown(value)
    is_item = not isinstance(value, list) and _fits([value], annotation)
    remedy = f"; write {name}=[{value}]" if is_item else ""
    raise ValueError(f"{name}: got {given}, but it must be {_describe(annotation)}{remedy}")


def check_settings(config: Any, kinds: Mapping[str, object]) -> None:  # noqa: ANN401
    """Check the seed and settings that no class declares.

    Args:
        config: All settings.
        kinds: Types of the settings, by name.

    Raises:
        ValueError: If one is of another type.
    """
    check_seed(config.seed)
    for name, kind in kinds.items():
        check_type(name, plain(OmegaConf.select(config, name)), kind)


def _targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Find all that is instantiated, each at the place where it is written."""
    if isinstance(node, DictConfig) and node.get("_target_") is not None:
        yield path, node
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        if key == "hydra" and not path:
            continue  # Hydra's own settings, before it takes them out
        child = node._get_node(key)
        if isinstance(child, DictConfig | ListConfig) and not (
            child._is_interpolation() or child._is_none() or child._is_missing()
        ):
            yield from _targets(child, f"{path}.{key}".lstrip("."))


def _origin(config: Any, name: str) -> tuple[str, object]:  # noqa: ANN401
    """Follow ``${...}`` to the setting that a user would change, and give its value."""
    parent: Any = config
    *parents, key = (int(part) if part.isdecimal() else part for part in name.split("."))
    for part in parents:
        parent = parent[part]
    node: Any = parent._get_node(key)
    reference = _REFERENCE.fullmatch(str(node._value())) if node._is_interpolation() else None
    return _origin(config, reference[1]) if reference else (name, plain(parent[key]))


def plain(value: Any) -> Any:  # noqa: ANN401
    """Return a setting with its lists and mappings as Python's own."""
    if isinstance(value, ListConfig):
        return [plain(item) for item in value]
    if isinstance(value, DictConfig) and "_target_" not in value:
        return {key: plain(item) for key, item in value.items()}
    return value


def _fits(value: object, annotation: object) -> bool:
    # What is instantiated is known only when it has been.
    return isinstance(value, DictConfig) or fits(value, annotation)


def _describe(annotation: object) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _NAMES:
        return _NAMES[annotation]  # pyright: ignore[reportArgumentType]
    if origin in (Union, UnionType):
        kinds = [one for one in arguments if one is not int or float not in arguments]
        return " or ".join(dict.fromkeys(map(_describe, kinds)))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(dict, kind) and len(arguments) == 2:
        return f"a mapping of names to {_describe(arguments[1])}"
    if isinstance(kind, type) and (kind is tuple or issubclass(list, kind)) and arguments:
        return "a list, each " + " or ".join(
            dict.fromkeys(_describe(one) for one in arguments if one is not ...)
        )
    if origin is not None:  # Callable
        return "a constructor (one of the files of conf/, or _target_ and _partial_: true)"
    return f"a {getattr(annotation, '__name__', annotation)} (_target_)"


def check_seed(seed: object) -> None:
    """Check that a seed is one that NumPy accepts.

    Raises:
        ValueError: If it is not.
    """
    check_type("seed", seed, int)
    if not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise ValueError(f"seed must be at least 0 and below 2^32, got {seed}")
