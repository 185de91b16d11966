"""Resuming a run with its own settings and the changes on the command line."""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nvae_lightning.cli.overrides import merge, parse, without_keys
from nvae_lightning.cli.plain_yaml import read_yaml
from nvae_lightning.serialization.checkpoints import step_of
from nvae_lightning.utilities.plain_data import shown
from nvae_lightning.utilities.signals import is_first_rank

CONFIG = "config.yaml"

#: Settings of this command, not of the run.
_OF_THE_COMMAND = (
    "ckpt_path", "run_dir", "run_id", "version", "device", "num_devices", "overrides",
)  # fmt: skip
#: Settings that a resume may change: the experiment, where the data are and how they are read.
_MAY_CHANGE = ("experiment", "root", "batch_size", "num_workers", "verify", "seed")
#: Settings that name folders to write to.
_PLACES = ("dirpath", "save_dir", "default_root_dir")
#: Settings of a logger that do not name a place to send or write to.
_LOGGING = (
    "entity", "project", "group", "job_type", "tags", "name", "offline", "resume",
    "experiment_name", "run_name",
)  # fmt: skip
#: A reference to another setting; it computes nothing.
_REFERENCE = re.compile(r"\$\{[\w.]+\}")


def saved_settings(run: Path) -> dict[str, Any] | None:
    """Read the settings of a run, as plain data; None if it has none.

    Raises:
        ValueError: If a training did not write the file.
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
    """Return the folder of the run that a checkpoint, or a folder of checkpoints, belongs to."""
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder


def with_saved_overrides(overrides: Sequence[str], *, is_sweep: bool) -> list[str]:
    """Put the overrides of a resumed run before those of the command line.

    Args:
        overrides: Overrides of the command line.
        is_sweep: Whether the command is a sweep, whose jobs all resume from one checkpoint.

    Raises:
        ValueError: If the run's overrides name code or places to write to.
    """
    given = {o.key_or_group: o.value() for o in parse(overrides) if not o.is_delete()}
    if str(given.get("hydra.job.name")).startswith("train_ddp_process"):
        return list(overrides)  # Lightning passes the whole list to further ranks
    is_sweep = is_sweep or given.get("hydra.mode") == "MULTIRUN"
    run = _resumed_run(given, is_sweep=is_sweep)
    if run is None or (settings := saved_settings(run)) is None:
        return list(overrides)
    saved = settings.get("overrides")
    if not isinstance(saved, list) or not all(isinstance(line, str) for line in saved):
        return list(overrides)  # of an earlier version; check_same() compares
    try:
        saved = without_keys(saved, _OF_THE_COMMAND)
    except OverrideParseException as error:
        raise ValueError(_damaged(run / CONFIG)) from error
    merged = merge(saved, overrides)
    taken = [line for line in merged if line in saved and line not in overrides]
    refused = [str(o.input_line) for o in parse(taken) if not _is_harmless(o)]
    if refused:
        raise ValueError(
            f"ckpt_path: the settings of '{run}' name code or places, which are never taken from "
            f"a file; if you trust them, repeat: {shlex.join(refused)}"
        )
    # The run may have been one job of an experiment that is a sweep.
    return merged if is_sweep or "hydra.mode" in given else [*merged, "hydra.mode=RUN"]


def _resumed_run(given: Mapping[str, object], *, is_sweep: bool) -> Path | None:
    path, folder = given.get("ckpt_path"), given.get("hydra.run.dir")
    if path in ("last", "best") and not is_sweep:  # otherwise each job's
        try:  # the user's own ${oc.env:...}
            folder = OmegaConf.create({"folder": folder}).folder
        except OmegaConfBaseException:
            return None
        return Path(folder).absolute() if isinstance(folder, str) else None
    if isinstance(path, str) and (found := Path(path).expanduser()).exists():
        return run_of(found)
    return None


def _is_harmless(override: Override) -> bool:
    """Return whether an override only selects options and sets values of this package."""
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
    """Yield all plain values in nested data, each with its keys."""
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _leaves(child, (*path, *str(key).split(".")))
    elif isinstance(value, list) and value:
        for child in value:
            yield from _leaves(child, path)
    else:
        yield path, str(value)


def check_same(config: Any, run: Path, *, dataset: str | None) -> None:  # noqa: ANN401
    """Check that a resume has the data and the model of its run.

    Args:
        config: Composed config.
        run: Folder of the run.
        dataset: Name of the dataset chosen on the command line, if any.

    Raises:
        ValueError: If they differ, or the run's settings are unknown.
    """
    before = saved_settings(run)
    if before is None:
        if dataset is None:
            raise ValueError(
                f"ckpt_path: there is no {CONFIG} of the run in '{run}' that names its dataset; "
                "add dataset=NAME, and the run's other settings"
            )
        return
    now: Any = OmegaConf.to_container(config, resolve=True)
    for name in ("choices", "dataset", "model"):
        for place, old, new in _differences(before.get(name), now[name], name):
            if name == "model" or not set(place.split(".")).intersection(_MAY_CHANGE):
                raise ValueError(
                    f"{place}: got {shown(new)}, but the run in '{run}' has {shown(old)}, and a "
                    "resume keeps the data and the model; leave it out, or start a new run "
                    "without ckpt_path"
                )


def _differences(before: object, now: object, name: str) -> Iterator[tuple[str, object, object]]:
    """Find settings of both that differ; another version may have other settings."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in before:
            if key in now:
                yield from _differences(before[key], now[key], f"{name}.{key}")
    elif before != now:
        yield name, before, now


def check_resume(config: Any, checkpoint: Path, run_dir: Path) -> None:  # noqa: ANN401
    """Compare a resume with its run; print the starting point and the changes.

    Args:
        config: Composed config.
        checkpoint: Checkpoint to resume from, already verified.
        run_dir: Folder of this training.

    Raises:
        ValueError: If it has other data or another model.
    """
    # A run's own checkpoints belong to it, wherever they are written.
    run = run_dir if config.ckpt_path in (None, "last", "best") else run_of(checkpoint)
    job = HydraConfig.get()
    task = [str(line) for line in job.overrides.task]
    is_chosen = any(override.key_or_group == "dataset" for override in parse(task))
    check_same(config, run, dataset=job.runtime.choices["dataset"] if is_chosen else None)
    saved = (saved_settings(run) or {}).get("overrides") or []
    changed = [line for line in without_keys(task, _OF_THE_COMMAND) if line not in saved]
    if is_first_rank():
        changes = f" with {' '.join(changed)}" if changed else ""
        print(f"resuming '{run}' at step {step_of(checkpoint)}{changes}", flush=True)


def run_id(run: Path, *, resumed: bool) -> str:
    """Return the name of the W&B run: the earlier one when a run is resumed, else a new one."""
    earlier = (saved_settings(run) or {}).get("run_id") if resumed else None
    if isinstance(earlier, str) and re.fullmatch(r"[\w-]+", earlier):
        return earlier
    return secrets.token_hex(4)
