"""Runs in folders, for the commands that compare them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nvae_lightning.benchmarking import cost_of
from nvae_lightning.cli.plain_yaml import read_yaml
from nvae_lightning.reporting import Run
from nvae_lightning.serialization.checkpoints import last_checkpoint
from nvae_lightning.training.module import NVAEModule
from nvae_lightning.utilities.plain_data import read_text


def find_runs(folder: Path) -> Iterator[Path]:
    """Find the folders of runs in a folder, sorted by their numbers."""
    if (folder / "config.yaml").is_file():
        yield folder
        return
    children = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    for child in sorted(children, key=lambda p: (not p.name.isdecimal(), p.name.zfill(9))):
        yield from find_runs(child)


def load_runs(folders: Sequence[str]) -> list[Run]:
    """Load all runs of folders, each with a name that distinguishes it.

    Raises:
        ValueError: If a folder has no runs, or a run's files are damaged.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        runs = list(find_runs(folder.absolute())) if folder.is_dir() else []
        if not runs:
            raise ValueError(
                f"runs: no run in '{folder}', a folder with a config.yaml; give the folder of a "
                "run or of a sweep"
            )
        found += [path for path in runs if path not in found]
    # The parent of each, so that a single run has a name too.
    root = os.path.commonpath([path.parent for path in found])
    return [load_run(path, str(path.relative_to(root))) for path in found]


def load_run(folder: Path, name: str) -> Run:
    """Load settings and metrics of a run."""
    settings = read_yaml(folder / "config.yaml")
    metrics = folder / "metrics.csv"
    rows: list[dict[str, float]] = []
    if metrics.is_file():
        try:
            text = metrics.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a running training may be writing the last row
            for row in csv.DictReader(whole.splitlines(), strict=True):
                values = {key: float(value) for key, value in row.items() if value}
                rows.append({"step": values["step"], **values})
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise ValueError(
                f"runs: row {len(rows) + 1} of '{metrics}' is damaged ({error}); leave this run "
                "out, or restore the file"
            ) from error
    return Run(name, settings, rows, partial(_flops_per_image, folder, settings))


def _flops_per_image(folder: Path, settings: Mapping[str, Any]) -> float | None:
    """Count the computation of a training step per image, as `benchmark` does.

    The checkpoint describes the model and its penalties; None without one.
    """
    checkpoint = last_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        return None
    module = NVAEModule.load_from_checkpoint(checkpoint)
    batch_size, precision = settings["dataset"]["batch_size"], settings["trainer"]["precision"]
    cost = cost_of(lambda: module, "train", batch_size=batch_size, precision=precision)
    return cost.flops / batch_size


def load_comparisons(folders: Sequence[str]) -> list[dict[str, Any]]:
    """Load the jobs of sweeps of ``benchmark``, each a comparison of two settings.

    Raises:
        ValueError: If a line of a ``benchmark.jsonl`` is damaged or has no second setting.
    """
    jobs = []
    for file in (Path(folder) / "benchmark.jsonl" for folder in folders):
        for number, line in enumerate(read_text(file).splitlines(), 1):
            try:
                job = json.loads(line)
                _, _ = job["settings"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"runs: line {number} of '{file}' is no comparison of two settings ({error}); "
                    "give the folder of a sweep of experiment=step_growth"
                ) from error
            jobs.append(job)
    return jobs
