"""Every experiment composes, builds, trains and is reported."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image
from warm_python import run_python

from nvae_lightning import load_model, reporting
from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.cli.runs import load_run
from nvae_lightning.serialization.hub import shipped_models

from .conftest import Compose, build_on_meta

NUM_JOBS = {
    "figure4": 5, "figure5": 2, "memory": 6, "recipes": 4, "stabilization": 4,
    "table1": 12, "table2": 9, "table3": 4, "table4": 2, "table5": 4,
}  # fmt: skip
LAYOUTS = sorted(path.stem for path in (Path(reporting.__file__).parent / "tables").glob("*.yaml"))

#: Overrides that scale all experiments down, and further ones for some.
SMALL = (
    "dataset=image_folder", "dataset.root=images", "dataset.image.size=16", "dataset.batch_size=4",
    "model=tiny", "trainer=cpu", "logger=csv", "trainer.max_steps=3",
    "trainer.log_every_n_steps=1", "num_importance_samples=1", "trainer.limit_test_batches=1",
    "~callbacks.pictures", "~callbacks.kl_per_group", "~callbacks.progress_bar",
    "trainer.enable_progress_bar=false",
)  # fmt: skip
SMALLER = {
    "table2": ["model.hierarchy.num_groups=[1],[2],[3]"],
    "table4": ["model.hierarchy.num_groups=[2]"],
    "table5": ["model.hierarchy.num_groups=[2]"],
    "figure4": ["callbacks.temperatures.num_passes=2", "callbacks.temperatures.num_images=3"],
    "stabilization": ["penalty.weight=0.0,1.0"],
    "recipes": ["seed=0"],
}  # fmt: skip

# One process for all commands, which saves most of the time.
DRIVER = """
import importlib, json, sys, torch
from nvae_lightning.cli.command import run
torch.set_num_threads(1)
for command, *arguments in json.loads(sys.argv[1]):
    sys.argv = [command, *arguments]
    run(importlib.import_module(f"nvae_lightning.{command}").main)
"""


def _jobs(name: str) -> list[list[str]]:
    """Overrides of all jobs of an experiment."""
    config: Any = OmegaConf.load(CONFIG_ROOT / "experiments" / f"{name}.yaml")
    swept = OmegaConf.select(config, "hydra.sweeper.params") or {}
    overrides = [f"{key}={value}" for key, value in swept.items()]
    parsed = OverridesParser.create().parse_overrides(overrides)
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [[f"experiment={name}", *job] for job in jobs]


@pytest.mark.parametrize(
    "name",
    [
        name if name == "table4" else pytest.param(name, marks=pytest.mark.slow)
        for name in NUM_JOBS
    ],
)
def test_every_job_composes_and_builds(compose_config: Compose, name: str) -> None:
    jobs = [compose_config(*job) for job in _jobs(name)]
    assert len(jobs) == NUM_JOBS[name]
    different = set()
    for config in jobs:
        assert sum(p.numel() for p in build_on_meta(config.model).parameters()) > 1e5
        groups = ("model", "dataset", "penalty", "compute", "optimizer")
        settings = [OmegaConf.to_yaml(config[group], resolve=True) for group in groups]
        different.add((*settings, config.trainer.precision, config.seed))
    assert len(different) == len(jobs)


def test_step_growth_changes_one_number_of_a_common_model(compose_config: Compose) -> None:
    common = compose_config("experiment=step_growth")
    series: dict[str, list[Any]] = {}
    for _, compare in _jobs("step_growth"):
        changes: Any = OverridesParser.create().parse_override(compare).value()
        ((setting, value),) = changes.items()
        series.setdefault(str(setting), []).append(value)
    assert [len(values) for values in series.values()] == [4, 5, 4, 5]
    for setting, values in series.items():
        assert OmegaConf.select(common, setting) in values


def test_the_weights_in_the_package_have_the_architecture_of_their_experiment(
    compose_config: Compose,
) -> None:
    for name in shipped_models():
        model = build_on_meta(compose_config(f"experiment=weights_{name}").model)
        assert model.architecture == load_model(name).architecture


def _cells(report: Path) -> dict[str, list[str]]:
    """Cells of a report's table, by row."""
    lines = [line for line in report.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows if not row[0].startswith("-")}


def _check_runs(folder: Path, name: str) -> None:
    found = sorted(path.parent for path in folder.glob("*/metrics.csv"))
    small = {"table1": 2, "figure4": 1, "figure5": 1, "stabilization": 2, "recipes": 2}
    assert len(found) == small.get(name, NUM_JOBS[name])
    for place in found:
        run = load_run(place, place.name)
        assert run.num_steps == 3
        losses = [row["train/loss"] for row in run.rows if "train/loss" in row]
        assert len(losses) == 3
        assert all(map(math.isfinite, losses))
        assert run.is_finite
        assert run.setting("choices.experiment") == name
        assert run.setting("device").startswith("CPU (")
        assert re.match(r"\d+\.\d+\.\d+", run.setting("version"))


def _check_report(folder: Path, name: str) -> None:
    (_, columns), *rows = _cells(folder / "report.md").items()
    assert ("paper" in columns) == (name not in ("recipes", "stabilization"))
    measured = {
        (label, column): cell
        for label, cells in rows
        for column, cell in zip(columns, cells, strict=True)
        if column != "paper"
    }
    # Cells for datasets and weights that the small runs lack stay empty.
    some = {
        "table1": {key for key in measured if key[1] == "image_folder"},
        "figure5": {key for key in measured if key[0] == "image_folder"},
        "stabilization": {key for key in measured if key[0] in ("λ = 0", "λ = 1")},
    }
    expected = some.get(name, set(measured))
    assert expected
    assert {key for key, cell in measured.items() if cell != "–"} == expected
    for key in expected:
        assert re.fullmatch(r"-?\d+(\.\d+)? \(1\)", measured[key]), (key, measured[key])
    with Image.open(folder / "report.png") as picture:
        assert min(picture.size) > 200


@pytest.mark.slow
def test_every_experiment_trains_three_steps_and_is_reported(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for index in range(12):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{index:02}.png")
    commands = []
    for name in NUM_JOBS:
        folders = [f"hydra.sweep.dir={name}", f"hydra.run.dir={name}/0"]
        small = [*SMALL, *SMALLER.get(name, [])]
        commands.append(["train", f"experiment={name}", *small, *folders])
        if name in LAYOUTS:
            report = [f"runs={name}", f"table={name}", f"hydra.run.dir=reports/{name}"]
            commands.append(["report", *report])
    result = run_python("-c", DRIVER, json.dumps(commands), cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stderr
    for name in NUM_JOBS:
        _check_runs(tmp_path / name, name)
    for name in LAYOUTS:
        _check_report(tmp_path / "reports" / name, name)
    with Image.open(tmp_path / "figure4" / "0" / "temperatures.png") as picture:
        colours = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colours) > 100
