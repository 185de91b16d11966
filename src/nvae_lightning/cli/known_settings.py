"""Refusal of unknown settings, with the nearest known name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.cli.setting_types import check_names, check_type

_CONF = CONFIG_ROOT / "conf"
#: Groups to which users may add entries with any name.
_OPEN = ("callbacks", "logger", "compare", "hydra")
#: Types of settings that no class declares, by the type of their default.
_KINDS = {bool: bool, int: int, str: str, float: float | list[float]}


def check_known(config: Any, command: str | None) -> None:  # noqa: ANN401
    """Check that something reads every setting, and the types of those that no class declares.

    A new name is read if an interpolation refers to it, or if the class that it configures has
    it as an argument.

    Args:
        config: Composed config of a command.
        command: Name of the command's config.

    Raises:
        ValueError: If a setting is unknown or of another type, or no dataset is chosen although
            one is required.
    """
    file = _CONF / f"{command}.yaml"
    if file.is_file():  # otherwise a custom config
        settings: Any = OmegaConf.to_container(config)
        known = known_names(str(command))
        if "dataset" in known and "dataset" not in config:
            names = sorted(path.stem for path in (_CONF / "dataset").glob("*.yaml"))
            raise ValueError(f"dataset: none is chosen; add dataset=NAME, one of {names}")
        for name in _unknown(settings, known):
            key = name.rpartition(".")[2]
            reference = rf"\$\{{\s*({re.escape(name)}|\.+{re.escape(key)})\b"
            if not re.search(reference, str(settings)):
                raise ValueError(refusal(name, str(command)))
        _check_types(config, _read(file))
    for group in ("callbacks", "logger"):
        for key, value in (config.get(group) or {}).items():
            if not (isinstance(value, DictConfig) and "_target_" in value):
                raise ValueError(
                    f"{group}.{key}: got {value!r}, but it must have a _target_; "
                    f"~{group}.{key} removes it"
                )
    check_names(config)


def refusal(name: str, command: str) -> str:
    """Say that a command has no setting of a name, and which one may be meant."""
    known = sorted(known_names(command))
    near = [other for other in known if other.endswith(f".{name}")]
    groups = _groups(_read(_CONF / f"{command}.yaml")) if "." not in name else ()
    for names in (groups, known):
        near += difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"nvae {command} --help lists the settings"
    return f"{name}: unknown setting; {remedy}"


@cache
def known_names(command: str) -> frozenset[str]:
    """Return the names of all settings of a command and of the files that can be chosen for it."""
    return frozenset(_names_in(_CONF / f"{command}.yaml", ""))


def _names_in(file: Path, place: str) -> Iterator[str]:
    config = _read(file)
    yield from _names(config, place)
    for group, package in _groups(config).items():
        for choice in sorted((file.parent / group).glob("**/*.yaml")):
            if not choice.read_text(encoding="utf-8").startswith("# @package _global_"):
                yield f"{place}{package}"
                yield from _names_in(choice, f"{place}{package}.")


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def _groups(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the groups of a defaults list, each with the package that it fills."""
    entries = [entry for entry in config.get("defaults", ()) if isinstance(entry, dict)]
    names = [name for entry in entries for name in entry if not name.startswith("override ")]
    return {name.partition("@")[0]: name.rpartition("@")[2] for name in names}


def _names(config: Mapping[str, Any], place: str) -> Iterator[str]:
    for key, value in config.items():
        if key != "defaults":
            yield f"{place}{key}"
            if isinstance(value, dict):
                yield from _names(value, f"{place}{key}.")


def _unknown(settings: Mapping[Any, Any], known: frozenset[str], place: str = "") -> Iterator[str]:
    """Find settings without a known name, except arguments of classes."""
    for key, value in settings.items():
        name = f"{place}{key}"
        if name == "hydra":
            continue
        if name not in known:
            yield name
        elif isinstance(value, dict) and "_target_" not in value and name not in _OPEN:
            yield from _unknown(value, known, f"{name}.")


def _check_types(config: Any, defaults: Mapping[str, Any]) -> None:  # noqa: ANN401
    for name, default in defaults.items():
        if type(default) in _KINDS and "${" not in str(default) and default != "???":
            check_type(name, config[name], _KINDS[type(default)])
    if "compile" in config:  # its default may depend on the trainer
        check_type("compile", config.compile, bool)
    if not 0 <= config.get("seed", 0) < 2**32:
        raise ValueError(f"seed must be at least 0 and below 2^32, got {config.seed}")
