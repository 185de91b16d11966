"""Refusing settings that nothing reads, with the nearest that there is."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from nvae_lightning.cli.overrides import how_to_quote
from nvae_lightning.cli.setting_types import check_names
from nvae_lightning.data import ImageDataModule

#: Groups whose files are laid over the whole config: they hold no settings of their own.
_GLOBAL = ("debug", "experiment", "hparams_search", "launcher")
#: Groups that a user extends by names of their own.
_OPEN = ("callbacks", "logger", "compare")
#: Settings of a dataset that commands read whatever the dataset.
_DATASET = ("batch_size", "datamodule", "image", "likelihood", "num_workers", "recipe", "root")
#: File of a dataset that has every key of a recipe.
_WHOLE = "mnist_5k.yaml"


def check_known(config: Any, name: str | None, dataset: str | None, folder: Path) -> None:  # noqa: ANN401
    """Check that every setting is one that something reads.

    A new name is read if an interpolation refers to it, or if the class that it is for takes it.

    Args:
        config: Composed config of a command.
        name: Name of the command's config.
        dataset: Name of the chosen dataset.
        folder: Folder of the package's configs.

    Raises:
        ValueError: If one is unknown, or no dataset is chosen where there must be one.
    """
    file = folder / f"{name}.yaml"
    if file.is_file():  # else a config of the user's own, which may hold what it likes
        primary = _read(file)
        groups = _groups(primary)
        if "dataset" in groups and "dataset" not in config:
            names = sorted(path.stem for path in (folder / "dataset").glob("*.yaml"))
            raise ValueError(f"dataset: none is chosen; add dataset=NAME, one of {_listed(names)}")
        known = (primary.keys() | groups) - {"defaults", *_GLOBAL}
        _check(config, "", known | {"hydra"}, groups)
        for key, value in primary.items():
            if isinstance(value, dict) and key not in (*_OPEN, "dataset", "hydra"):
                _check(config, key, value)
        if "dataset" in groups:
            chosen = folder / "dataset" / f"{dataset}.yaml"
            described = _read(chosen if chosen.is_file() else folder / "dataset" / _WHOLE)
            keys = {*_DATASET, *primary.get("dataset", ())}
            if chosen.is_file():
                keys |= described.keys()
            if dataset is None:  # that of a training, of any class
                keys |= inspect.signature(ImageDataModule).parameters.keys()
            _check(config, "dataset", keys - {"defaults"})
            _check(config, "dataset.recipe", described["recipe"])
    for group in ("callbacks", "logger"):
        for key, value in (config.get(group) or {}).items():
            if not (isinstance(value, DictConfig) and "_target_" in value):
                raise ValueError(
                    f"{group}.{key}: got {value!r}, but it must be what a _target_ makes; "
                    f"~{group}.{key} leaves it out"
                )
    check_names(config)


def check_known_to_hydra(node: Any, name: str = "hydra") -> None:  # noqa: ANN401
    """Check that Hydra has all of its own settings that are given.

    Raises:
        ValueError: If one is unknown.
    """
    kind = OmegaConf.get_type(node)
    known = [f.name for f in fields(kind)] if is_dataclass(kind) else [str(key) for key in node]
    for key in node:
        if key not in known and f"{name}.{key}" != "hydra.env":  # a group without a type
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {name}.{near[0]}?" if near else f"it has {_listed(known)}"
            raise ValueError(f"{name}.{key}: Hydra has no such setting; {remedy}")
        child = node._get_node(key)
        if f"{name}.{key}" in ("hydra.launcher", "hydra.sweeper"):
            continue  # of plugins, which check them
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing()):
            check_known_to_hydra(child, f"{name}.{key}")


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _groups(primary: dict[str, Any]) -> set[str]:
    entries = [entry for entry in primary["defaults"] if isinstance(entry, dict)]
    return {name for entry in entries for name in entry if not name.startswith("override ")}


def _check(config: Any, place: str, known: Iterable[str], groups: Iterable[str] = ()) -> None:  # noqa: ANN401
    node = OmegaConf.select(config, place) if place else config
    if not isinstance(node, DictConfig) or "_target_" in node:
        return
    unknown = [str(key) for key in node if key not in set(known)]
    if not unknown:
        return
    text = OmegaConf.to_yaml(config)
    for key in unknown:
        absolute, relative = re.escape(f"{place}.{key}".lstrip(".")), re.escape(key)
        if not re.search(rf"\$\{{\s*({absolute}|\.+{relative})\b", text):
            raise ValueError(_message(config, place, key, known, groups))


def _message(
    config: Any, place: str, key: str, known: Iterable[str], groups: Iterable[str],  # noqa: ANN401
) -> str:  # fmt: skip
    name = f"{place}.{key}".lstrip(".")
    if key in groups:
        hint = ", such as hydra.launcher.n_jobs=2" if key == "launcher" else ""
        return f"{name}: it holds no settings of its own{hint}; choose a file with {key}=NAME"
    names = sorted({*known, *groups} - {"hydra"})
    inner = [
        f"{group}.{key}"
        for group in names
        if not place and isinstance(config.get(group), DictConfig) and key in config[group]
    ]
    near = difflib.get_close_matches
    closest = near(key, groups, n=1) or near(key, names, n=1)
    if best := [*inner, *(f"{place}.{one}".lstrip(".") for one in closest)]:
        return f"{name}: there is no such setting; did you mean {best[0]}?"
    return f"{name}: there is no such setting; there are {_listed(names)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def explain(message: str, name: str, overrides: list[str], folder: Path) -> str | None:
    """Say what to write instead of an override that Hydra could not apply.

    Hydra recommends a plus in front of it, which may only make a key that nothing reads.

    Args:
        message: Hydra's error.
        name: Name of the command's config.
        overrides: Those of the command line.
        folder: Folder of the package's configs.

    Returns:
        The explanation; None if the error is another one.
    """
    if found := re.search(r"Ambiguous value for argument '([^=]+)=(.*?)' 1\. To use", message):
        text = how_to_quote(f"{found[1]}={found[2]}")
        return (
            f"{found[1]}: {found[2]} is several values; for one text write {text}, for a list "
            f"'{found[1]}=[{found[2]}]', and for a sweep add -m"
        )
    found = re.search(r"Could not override '([^']+)'", message)
    if found is None:
        return None
    parsed = OverridesParser.create().parse_overrides(overrides)
    failed = [o.input_line for o in parsed if o.key_or_group == found[1]]
    others = [
        str(override.input_line)
        for override in parsed
        if override.key_or_group != found[1]
        and not override.is_sweep_override()
        and not override.is_hydra_override()
    ]
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            overrides = [*others, *(f"+{line}" for line in failed)]
            config = compose(name, overrides, return_hydra_config=True)
        check_known_to_hydra(config.hydra)
        check_known(config, name, config.hydra.runtime.choices.get("dataset"), folder)
    except Exception as error:  # of composing it, too: the override is wrong in another way
        return str(error) if isinstance(error, ValueError) else None
    return f"{found[1]}: it is not set until it is added; write +{failed[0]}"
