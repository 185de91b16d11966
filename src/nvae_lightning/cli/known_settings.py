"""Settings that nothing reads, refused with the nearest name that exists."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.cli.overrides import parse
from nvae_lightning.cli.setting_types import check_names

_CONF = CONFIG_ROOT / "conf"
#: Groups to which users may add entries with any name.
_OPEN = ("callbacks", "logger", "compare", "hydra")


def check_known(config: Any, name: str | None) -> None:  # noqa: ANN401
    """Check that something reads every setting.

    A new name is read if an interpolation refers to it, or if the class that it configures has
    it as an argument.

    Args:
        config: Composed config of a command.
        name: Name of the command's config.

    Raises:
        ValueError: If a setting is unknown, or no dataset is chosen although one is required.
    """
    if (_CONF / f"{name}.yaml").is_file():  # else a config of the user's own
        known = _known(str(name))
        if "dataset" in known and "dataset" not in config:
            names = sorted(path.stem for path in (_CONF / "dataset").glob("*.yaml"))
            raise ValueError(f"dataset: none is chosen; add dataset=NAME, one of {_list(names)}")
        _check(config, config, known, "")
    for group in ("callbacks", "logger"):
        for key, value in (config.get(group) or {}).items():
            if not (isinstance(value, DictConfig) and "_target_" in value):
                raise ValueError(
                    f"{group}.{key}: got {value!r}, but it must have a _target_; "
                    f"~{group}.{key} removes it"
                )
    check_names(config)


@cache
def _known(name: str) -> dict[str, Any]:
    """Return all settings of a command and of the files that can be chosen for it."""
    known = _read(_CONF / f"{name}.yaml")
    for group in [group for group in _groups(known) if "/" not in group]:
        settings: dict[str, Any] = {}
        is_global = False
        for file in (_CONF / group).glob("*.yaml"):
            is_global = file.read_text(encoding="utf-8").startswith("# @package _global_")
            read = {} if is_global else _read(file)
            _merge(settings, {**dict.fromkeys(_groups(read)), **read})
        if settings or not is_global:
            known[group] = _merge(settings, known.get(group) or {})
    return {key: value for key, value in known.items() if key != "defaults"}


def _read(file: Path) -> dict[str, Any]:
    """Read a config, together with the files that it always includes."""
    read = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    for entry in read.get("defaults", ()):
        if isinstance(entry, str) and entry.endswith("@_here_"):
            read = {**_read(file.parent / f"{entry.removesuffix('@_here_')}.yaml"), **read}
    return read


def _groups(config: Mapping[str, Any]) -> list[str]:
    """Return the packages that a defaults list fills."""
    entries = [entry for entry in config.get("defaults", ()) if isinstance(entry, dict)]
    names = [name for entry in entries for name in entry if not name.startswith("override ")]
    return [name.rpartition("@")[2] for name in names]


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in other.items():
        before = into.get(key)
        is_nested = isinstance(value, dict)
        into[key] = _merge(dict(before or {}), value) if is_nested else before or value
    return into


def _check(config: Any, node: Any, known: Mapping[str, Any], place: str) -> None:  # noqa: ANN401
    for key in map(str, node):
        name = f"{place}.{key}".lstrip(".")
        if key not in known and name != "hydra":
            reference = rf"\$\{{\s*({re.escape(name)}|\.+{re.escape(key)})\b"
            if not re.search(reference, OmegaConf.to_yaml(config)):
                raise ValueError(f"{name}: there is no such setting; {_remedy(key, known, place)}")
        child, settings = node._get_node(key), known.get(key)
        is_plain = isinstance(child, DictConfig) and not (
            child._is_interpolation() or child._is_none() or child._is_missing()
        )
        if is_plain and settings and isinstance(settings, dict) and name not in _OPEN:
            assert isinstance(child, DictConfig)
            if "_target_" not in child:
                _check(config, child, settings, name)


def _remedy(key: str, known: Mapping[str, Any], place: str) -> str:
    names = sorted(known)
    inner = [
        f"{name}.{key}"
        for name, settings in known.items()
        if not place and isinstance(settings, dict) and key in settings
    ]
    groups = [name for name in names if not place and (_CONF / name).is_dir()]
    near = difflib.get_close_matches
    closest = near(key, groups, n=1) or near(key, names, n=1)
    if best := [*inner, *(f"{place}.{one}".lstrip(".") for one in closest)]:
        return f"did you mean {best[0]}?"
    return f"choose one of {_list(names)}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def explain(message: str, name: str, overrides: list[str]) -> str | None:
    """Say what to write instead of an override that Hydra could not apply.

    Hydra recommends a plus before the name, even where it only adds a setting that nothing reads.

    Args:
        message: Hydra's error.
        name: Name of the command's config.
        overrides: Overrides of the command line.

    Returns:
        The explanation; None if the error is another one.
    """
    found = re.search(r"Could not override '([^']+)'", message)
    if found is None or found[1].startswith("hydra."):
        return None
    parsed = [o for o in parse(overrides) if not o.is_sweep_override()]
    failed = [str(o.input_line) for o in parsed if o.key_or_group == found[1]]
    others = [
        str(o.input_line)
        for o in parsed
        if o.key_or_group != found[1] and not o.is_hydra_override()
    ]
    try:
        with initialize_config_dir(str(_CONF), version_base="1.3"):
            config = compose(name, [*others, *(f"+{line}" for line in failed)])
        check_known(config, name)
    except ValueError as error:
        return str(error)
    except Exception:  # the override is wrong in another way, too
        return None
    return f"{found[1]}: the config does not have it; add it with +{failed[0]}"
