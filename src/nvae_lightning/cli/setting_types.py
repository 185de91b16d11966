"""Settings of a config against the types that the classes they are for declare."""

from __future__ import annotations

import difflib
import inspect
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

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
_SHARED = ("seed", "dataset.image.")  # settings that are not the data module's alone
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
    _fit_to_data_module(config)
    for path, node, target, parameters in _parameters(config):
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        names = [name for name in parameters if name not in ("self", "args")]
        for key in node:
            if key not in _SPECIAL and key not in parameters:
                near = difflib.get_close_matches(str(key), names, n=1)
                remedy = f"did you mean {near[0]}?" if near else f"it takes {', '.join(names)}"
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
    """Find what is instantiated: its place, its settings, its class and what that takes."""
    for path, node in _targets(config, ""):
        try:
            target = get_object(str(node["_target_"]))
            parameters = inspect.signature(target, eval_str=True).parameters
        except (ImportError, NameError, ValueError, TypeError):
            continue  # instantiating it says what is wrong with the target itself
        yield path, node, str(node["_target_"]), parameters


def build_datamodule(config: Any, *, ours: bool = False) -> Any:  # noqa: ANN401
    """Build the data module of the settings.

    Args:
        config: All settings, checked.
        ours: Whether it must be one of this package's, as prepares or shows images.

    Raises:
        ValueError: If it is something else.
    """
    found = instantiate(config.dataset.datamodule, _convert_="all")
    expected = ImageDataModule if ours else LightningDataModule
    if not isinstance(found, expected):
        raise ValueError(
            f"dataset.datamodule._target_: got {type(found).__name__}, but it must be a "
            f"{expected.__name__}; give the name of one"
        )
    return found


def _fit_to_data_module(config: Any) -> None:  # noqa: ANN401
    """Leave out the dataset's own settings that a user's own data module does not take.

    Raises:
        ValueError: If the user has given one of them.
    """
    node: Any = OmegaConf.select(config, "dataset.datamodule") or {}
    target = str(node.get("_target_", "nvae_lightning."))
    if target.startswith("nvae_lightning."):
        return
    try:
        kind = get_object(target)
        parameters = dict(inspect.signature(kind).parameters)
    except (ImportError, ValueError, TypeError):
        return  # instantiating it says what is wrong with the target
    if getattr(kind, "__init__", None) is LightningDataModule.__init__:
        parameters = {}  # which it takes any of, and ignores
    elif any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    own = inspect.signature(ImageDataModule).parameters
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    names = {override.lstrip("+~").partition("=")[0] for override in given}
    for key in [key for key in node if key not in parameters and key not in _SPECIAL]:
        place = f"dataset.datamodule.{key}"
        origin = _origin(config, place)[0]
        is_given = place in names or (origin in names and not origin.startswith(_SHARED))
        if is_given or key not in own:
            raise ValueError(
                f"{place if place in names else origin}: {target} takes no setting {key}; it "
                f"takes {', '.join(parameters) or 'none'}"
            )
        with open_dict(node):
            del node[key]


def check_type(name: str, value: object, annotation: object) -> None:
    """Compare one value with the type it should have.

    Raises:
        ValueError: If it is of another type, or not finite.

    >>> check_type("seed", 1, int)
    >>> check_type("seed", 1.5, int)
    Traceback (most recent call last):
    ValueError: seed: got 1.5, but it must be a whole number; set seed accordingly
    """
    if _fits(value, annotation):
        return
    flag = {None: "null", True: "true", False: "false"}.get(value) if _is_flag(value) else None
    remedy = f"set {name} accordingly"
    if not isinstance(value, list) and _fits([value], annotation):
        remedy = f"write {name}=[{value}]"
    raise ValueError(
        f"{name}: got {flag or shown(value)}, but it must be {_describe(annotation)}; {remedy}"
    )


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


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


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
    """Check a seed.

    Raises:
        ValueError: If it is none.
    """
    check_type("seed", seed, int)
    if not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise ValueError(f"seed must be at least 0 and below 2^32, got {seed}")
