"""Going on with a run by its own settings, whatever else is given on the command line."""

from __future__ import annotations

import re
import reprlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nvae_lightning.cli.overrides import merge, parse, without_keys
from nvae_lightning.utilities.plain_yaml import read_yaml
from nvae_lightning.utilities.signals import is_first_rank

CONFIG = "config.yaml"

#: Keys of this command, not of the run.
_OF_THE_COMMAND = (
    "ckpt_path",
    "run_dir",
    "run_id",
    "version",
    "device",
    "num_devices",
    "overrides",
)
#: What a resume may change about the data: where they are and how they are read.
_OF_THE_MACHINE = (
    "root", "batch_size", "num_workers", "verify", "seed", "download_hint", "recipe",
)  # fmt: skip
#: Settings that say where files are written.
_PLACES = ("dirpath", "save_dir", "default_root_dir")
#: Settings of a logger that do not say where anything is sent or written.
_LOGGING = ("entity", "project", "group", "job_type", "tags", "name", "offline", "resume")
#: To another setting: nothing is computed.
_REFERENCE = re.compile(r"\$\{[\w.]+\}")
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200


def saved_settings(run: Path) -> dict[str, Any] | None:
    """Read the settings of a run, as plain data; None if it has none.

    Raises:
        ValueError: If the file is not one that a training writes.
    """
    file = run / CONFIG
    if not file.is_file():
        return None
    try:
        return read_yaml(file)
    except ValueError as error:
        raise ValueError(_damaged(file)) from error


def _damaged(file: Path) -> str:
    return f"ckpt_path: '{file}' is damaged; restore it, or start a new run"


def run_of(path: Path) -> Path:
    """Return the folder of the run that a checkpoint, or a folder of checkpoints, is in."""
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder


def with_saved_overrides(overrides: Sequence[str], *, is_sweep: bool) -> list[str]:
    """Put the overrides of the run that is resumed in front of a command's own.

    Args:
        overrides: Of the command line.
        is_sweep: Whether they are those of a sweep, whose jobs resume from one checkpoint.

    Raises:
        ValueError: If those of the run name code, or places to write to: the run may be anybody's.
    """
    given = {o.key_or_group: o.value() for o in parse(overrides) if not o.is_delete()}
    if str(given.get("hydra.job.name")).startswith("train_ddp_process"):
        return list(overrides)  # Lightning gives its processes the whole list
    is_sweep = is_sweep or given.get("hydra.mode") == "MULTIRUN"
    run = _resumed_run(given, is_sweep=is_sweep)
    if run is None or (settings := saved_settings(run)) is None:
        return list(overrides)
    for group in ("dataset", "model"):
        before, now = _get(settings, "choices", group), given.get(group)
        if isinstance(now, str) and before is not None and now != before:
            raise ValueError(_refusal(group, before, now, run))
    saved = settings.get("overrides")
    if not isinstance(saved, list) or not all(isinstance(line, str) for line in saved):
        return list(overrides)  # of an earlier version: check_same() compares
    try:
        saved = without_keys(saved, _OF_THE_COMMAND)
    except OverrideParseException as error:
        raise ValueError(_damaged(run / CONFIG)) from error
    merged = merge(saved, overrides)
    refused = [line for line in merged if line in saved and line not in overrides]
    refused = [str(o.input_line) for o in parse(refused) if not _is_harmless(o)]
    if refused:
        raise ValueError(
            f"ckpt_path: the settings of '{run}' name code or places, which are not taken from a "
            f"file; if you trust them, repeat: {shlex.join(refused)}"
        )
    # An experiment may be a sweep, of which the run was one job.
    return merged if is_sweep or "hydra.mode" in given else [*merged, "hydra.mode=RUN"]


def _resumed_run(given: Mapping[str, object], *, is_sweep: bool) -> Path | None:
    path, folder = given.get("ckpt_path"), given.get("hydra.run.dir")
    if path in ("last", "best") and not is_sweep:  # else that of each job
        try:  # ${oc.env:...} of the user's own
            folder = OmegaConf.create({"folder": folder}).folder
        except OmegaConfBaseException:
            return None
        return Path(folder).absolute() if isinstance(folder, str) else None
    if isinstance(path, str) and (found := Path(path).expanduser()).exists():
        return run_of(found)
    return None


def _is_harmless(override: Override) -> bool:
    """Whether an override from a file can only choose and set what this package knows."""
    key = tuple(override.key_or_group.split("."))
    place = tuple((override.package or "").split("."))
    if "hydra" in (key[0], place[0]):
        return False
    for path, text in _leaves(override.value(), key):
        if any(part.startswith("_") or part in _PLACES for part in (*path, *place)):
            return False
        if path[0] == "logger" and len(path) > 1 and path[-1] not in _LOGGING:
            return False
        if "${" in _REFERENCE.sub("", text):
            return False
        if len(key) == 1 and re.search(r"[/\\]|\.\.", text):
            return False  # the choice of a file from elsewhere
    return True


def _leaves(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Find all plain values in a value, each with the keys that lead to it."""
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _leaves(child, (*path, *str(key).split(".")))
    elif isinstance(value, list) and value:
        for child in value:
            yield from _leaves(child, path)
    else:
        yield path, str(value)


def check_same(config: Any, run: Path, *, dataset: str | None) -> list[str]:  # noqa: ANN401
    """Compare the settings of a resume with those of its run.

    Args:
        config: Composed config.
        run: Folder of the run.
        dataset: Name of the dataset that is chosen on the command line, if any is.

    Returns:
        Settings that have changed, each as ``name: before -> now``.

    Raises:
        ValueError: If they are those of another experiment, or the run's are not known.
    """
    before = saved_settings(run)
    if before is None:
        if dataset is None:
            raise ValueError(
                f"ckpt_path: there is no {CONFIG} of the run in '{run}' that would name its "
                "dataset; add dataset=NAME, and the run's other settings"
            )
        return []
    now: Any = OmegaConf.to_container(config, resolve=True)
    pairs = {
        "dataset": (_get(before, "choices", "dataset"), _get(now, "choices", "dataset")),
        **dict(_differences(_facts(before), _facts(now), "dataset")),
        **dict(_differences(before.get("model"), now["model"], "model")),
    }
    for name, (old, new) in pairs.items():
        if old != new:
            raise ValueError(_refusal(name, old, new, run))
    changed = _differences(before, now, "")
    moved = (str(before.get("run_dir")), str(config.run_dir))
    return [
        f"{name}: {_shown(old)} -> {_shown(new)}"
        for name, (old, new) in changed
        if name.partition(".")[0] not in (*_OF_THE_COMMAND, "module", "choices")
        and not _is_reference(config, name)
        and not (isinstance(old, str) and old.replace(*moved) == new)
    ]


def _refusal(name: str, before: object, now: object, run: Path) -> str:
    return (
        f"{name}: got {_shown(now)}, but the run in '{run}' has {_shown(before)}, and a resume is "
        "of the same data and model; leave it out, or start a new run without ckpt_path"
    )


def _get(settings: Mapping[str, Any], *keys: str) -> object:
    node: object = settings
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _facts(settings: Mapping[str, Any]) -> dict[str, object]:
    """What makes a dataset the same: all but where it is and how it is read."""
    dataset = settings.get("dataset")
    if not isinstance(dataset, Mapping):
        return {}
    facts = {key: value for key, value in dataset.items() if key not in _OF_THE_MACHINE}
    module = facts.get("datamodule")
    if isinstance(module, Mapping):
        facts["datamodule"] = {k: v for k, v in module.items() if k not in _OF_THE_MACHINE}
    return facts


def _differences(
    before: object, now: object, name: str
) -> Iterator[tuple[str, tuple[object, object]]]:
    """Find settings of both that differ; a version may have others than the one before."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in before:
            if key in now:
                yield from _differences(before[key], now[key], f"{name}.{key}".lstrip("."))
    elif before != now:
        yield name, (before, now)


def _is_reference(config: Any, name: str) -> bool:  # noqa: ANN401
    """Whether a setting is that of another name, which is compared itself."""
    node: Any = config
    for key in name.split("."):
        node = node._get_node(key)
        if node is None:
            return False
        if node._is_interpolation():
            return _REFERENCE.fullmatch(str(node._value())) is not None
    return False


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _SHORT.repr(value).strip("'")


def check_resume(config: Any, checkpoint: Path, run_dir: Path) -> None:  # noqa: ANN401
    """Compare a resume with its run, and tell where it begins and what has changed.

    Args:
        config: Composed config.
        checkpoint: The whole checkpoint to resume from.
        run_dir: Folder that this training writes to.

    Raises:
        ValueError: If it would be another experiment, or end before it begins.
    """
    # Checkpoints of this run's own are its, wherever they are written to.
    run = run_dir if config.ckpt_path in (None, "last", "best") else run_of(checkpoint)
    job = HydraConfig.get()
    keys = [override.key_or_group for override in parse(job.overrides.task)]
    chosen = job.runtime.choices.get("dataset") if "dataset" in keys else None
    changed = check_same(config, run, dataset=chosen)
    progress = progress_of(checkpoint)
    end = check_end(progress, config.trainer.max_steps, config.trainer.max_epochs)
    if is_first_rank():
        changes = f" with: {', '.join(changed)}" if changed else ""
        print(f"resuming '{run}' at step {progress.num_steps}{changes}", flush=True)
        if end is not None:
            print(end, flush=True)


@dataclass(frozen=True)
class Progress:
    """How far a training has come.

    Args:
        num_steps: Optimiser steps made.
        num_epochs: Epochs completed.
        within_epoch: Whether another one has begun.
    """

    num_steps: int
    num_epochs: int
    within_epoch: bool


def progress_of(checkpoint: Path) -> Progress:
    """Read from a whole checkpoint how far its training has come."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    loop = content.get("loops", {}).get("fit_loop", {})
    epochs = loop.get("epoch_progress", {}).get("current", {})
    batches = loop.get("epoch_loop.batch_progress", {}).get("current", {})
    completed, begun = epochs.get("processed", 0), epochs.get("ready", 0)
    within_epoch = completed < begun and batches.get("ready", 0) > 0
    return Progress(content.get("global_step", 0), completed, within_epoch)


def check_end(progress: Progress, max_steps: int, max_epochs: int | None) -> str | None:
    """Compare the end of a training with the place that it resumes from.

    Returns:
        What to tell if it has already come to its end.

    Raises:
        ValueError: If the end is before that place.
    """
    steps, epochs = progress.num_steps, progress.num_epochs
    if 0 < max_steps < steps:
        raise ValueError(
            f"trainer.max_steps: got {max_steps}, but the checkpoint is of step {steps}; set a "
            "larger trainer.max_steps, or start a new run without ckpt_path"
        )
    begun = epochs + progress.within_epoch
    if max_epochs is not None and 0 < max_epochs < begun:
        raise ValueError(
            f"trainer.max_epochs: got {max_epochs}, but the checkpoint is of epoch {begun} (step "
            f"{steps}); set a larger trainer.max_epochs, or start a new run without ckpt_path"
        )
    if max_steps == steps:
        return f"already trained to step {steps}; set a larger trainer.max_steps to train further"
    if max_epochs == epochs:
        return (
            f"already trained to epoch {epochs} (step {steps}); set a larger trainer.max_epochs "
            "to train further"
        )
    return None
