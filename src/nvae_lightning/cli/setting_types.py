"""Check settings against the parameters of the classes that they configure."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, ListConfig, open_dict

from nvae_lightning.data import ImageDataModule
from nvae_lightning.utilities.plain_data import misfit, shown

_REFERENCE = re.compile(r"\$\{(\w[\w.]*)\}")
_SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


def check_names(config: Any) -> None:  # noqa: ANN401 -- beartype warns of DictConfig's own bases
    """Check that every class accepts its settings.

    Raises:
        ValueError: If a setting is unknown to its class.
    """
    unused = _unused(config)
    for path, node, target, parameters in _parameters(config):
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            ignored = (*_SPECIAL, *(unused if path == "dataset" else ()))
            check_taken(path, [key for key in node if key not in ignored], target, parameters)


def check_taken(
    place: str, names: Iterable[str], target: str, parameters: Mapping[str, inspect.Parameter]
) -> None:
    """Check that a class takes settings.

    Raises:
        ValueError: If it does not take one.
    """
    known = [name for name in parameters if name not in ("self", "args")]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
            raise ValueError(f"{place}.{name}: {target} does not take it; {remedy}")


def check_types(config: Any) -> None:  # noqa: ANN401
    """Check all settings against the types of the parameters they are passed to.

    Hydra passes on what it is given, so that ``batch_size=foo`` would first fail where it is
    used, which may be in the middle of a training.

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
        ours: Whether it must be a data module of this package, as for preparing images.

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
    """Return the parameters of a target; None if unreadable, which instantiation will explain."""
    try:
        target: Any = get_object(name)
        if getattr(target, "__init__", None) is LightningDataModule.__init__:
            return {}  # it accepts anything and ignores it
        return inspect.signature(target, eval_str=True).parameters
    except (ImportError, NameError, ValueError, TypeError):
        return None


def _unused(config: Any) -> list[str]:  # noqa: ANN401
    """List settings of this package's datasets that a user's class lacks, and not given."""
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
    ValueError: seed: got 1.5, but it must be a valid integer
    """
    value = plain(value)
    expected = misfit(value, annotation)
    if expected is not None:
        is_flag = value is None or isinstance(value, bool)
        given = json.dumps(value) if is_flag else shown(value)
        is_item = not isinstance(value, list) and misfit([value], annotation) is None
        remedy = f"; write {name}=[{value}]" if is_item else ""
        raise ValueError(f"{name}: got {given}, but it must be {expected}{remedy}")


def _targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Yield every target to instantiate and its place in the config."""
    if isinstance(node, DictConfig) and node.get("_target_") is not None:
        yield path, node
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        if key == "hydra" and not path:
            continue  # Hydra's own settings, before it removes them
        child = node._get_node(key)
        if isinstance(child, DictConfig | ListConfig) and not (
            child._is_interpolation() or child._is_none() or child._is_missing()
        ):
            yield from _targets(child, f"{path}.{key}".lstrip("."))


def _origin(config: Any, name: str) -> tuple[str, object]:  # noqa: ANN401
    """Follow ``${...}`` to the setting that a user would change; return it and its value."""
    parent: Any = config
    *parents, key = (int(part) if part.isdecimal() else part for part in name.split("."))
    for part in parents:
        parent = parent[part]
    node: Any = parent._get_node(key)
    reference = _REFERENCE.fullmatch(str(node._value())) if node._is_interpolation() else None
    return _origin(config, reference[1]) if reference else (name, plain(parent[key]))


def plain(value: Any) -> Any:  # noqa: ANN401
    """Return a setting with OmegaConf's containers as Python's."""
    if isinstance(value, ListConfig):
        return [plain(item) for item in value]
    if isinstance(value, DictConfig) and "_target_" not in value:
        return {key: plain(item) for key, item in value.items()}
    return value
