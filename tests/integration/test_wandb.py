"""The records of a run in W&B (offline), TensorBoard and CSV."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm_python import run_python

from nvae_lightning.inference.loading import load_model
from nvae_lightning.training.wandb_workspace import build_workspace

from .conftest import Run

GROUPS = ("00", "01")
STAGES = ("train", "val", "test")
# The documented names.
NAMES = {
    *(f"{stage}/{name}" for stage in STAGES for name in ("elbo", "bpd", "distortion", "rate")),
    *(f"{stage}/kl_group/{group}" for stage in STAGES for group in GROUPS),
    *(f"{stage}/active_channels/{group}" for stage in STAGES for group in GROUPS),
    *(f"train/kl_balance/{group}" for group in GROUPS),
    *("train/loss", "train/beta", "train/penalty_weight", "train/spectral", "train/bn_scale"),
    *("train/grad_norm", "train/weight_norm", "train/images_per_second", "lr-Adamax"),
    *("test/nll", "test/nll_bpd"),
}
PICTURES = {
    *("train/kl_heatmap", "train/kl_per_group"),
    *(f"{stage}/{name}" for stage in ("val", "test") for name in ("samples", "reconstructions")),
}
TINY = (
    "trainer=cpu", "model.hierarchy.max_groups_per_scale=1", "dataset.batch_size=8",
    "num_importance_samples=2", "trainer.log_every_n_steps=1", "trainer.check_val_every_n_epoch=1",
    "trainer.limit_train_batches=2", "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2", "callbacks.pictures.num_images=8",
)  # fmt: skip
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with all loggers: two epochs of two steps, validations and a test."""
    folder = tmp_path_factory.mktemp("logged")
    result = run_python(
        "-m", "nvae_lightning.train", *TINY, "logger=[default,tensorboard]", "trainer.max_steps=4",
        "hydra.run.dir=run", "callbacks.checkpoint.every_n_train_steps=1",
        "callbacks.checkpoint.keep=9", cwd=folder, env=QUIET,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder / "run"


def _records(run: Path) -> list[dict[str, Any]]:
    """All records of a W&B run, read with the wandb command."""
    pytest.importorskip("wandb", minversion="0.31", reason="older versions cannot read a run")
    (log,) = run.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def records(run: Path) -> list[dict[str, Any]]:
    return _records(run)


def _of_type(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


@pytest.fixture(scope="module")
def at_wandb(records: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """All values by name, in order; files have names like ``val/samples.filenames``."""
    values: dict[str, list[Any]] = {}
    for row in _of_type(records, "history"):
        for name, value in row["item"].items():
            values.setdefault(name, []).append(value)
    return values


def _columns(run: Path) -> dict[str, list[float]]:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_all_loggers_have_the_same_finite_values(
    run: Path, at_wandb: dict[str, list[Any]]
) -> None:
    columns = _columns(run)
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    steps = {"step", "trainer/global_step", "_step", "_timestamp", "_runtime"}
    numbers = {name for name in at_wandb if "." not in name} - steps
    assert numbers >= NAMES
    assert set(board.Tags()["scalars"]) == set(columns) - steps == numbers
    for name in numbers:
        assert all(math.isfinite(value) for value in columns[name])
        assert at_wandb[name] == pytest.approx(columns[name])
        assert [event.value for event in board.Scalars(name)] == pytest.approx(columns[name])
    assert len(columns["train/loss"]) == 4
    assert len(columns["val/elbo"]) == 2


def test_pictures_are_logged_to_wandb_and_tensorboard(
    run: Path, at_wandb: dict[str, list[Any]]
) -> None:
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(board.Tags()["images"]) == PICTURES
    (files,) = run.glob("wandb/offline-run-*/files")
    for name in PICTURES:
        paths = [files / path for paths in at_wandb[f"{name}.filenames"] for path in paths]
        # One per validation; the end of the training adds none.
        assert len(paths) == len(board.Images(name)) == (1 if name.startswith("test/") else 2)
        for path in paths:
            with Image.open(path) as picture:
                assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    for name in ("kl_heatmap", "kl_per_group"):
        (last,) = at_wandb[f"train/{name}.filenames"][-1]
        with Image.open(files / last) as logged, Image.open(run / f"{name}.png") as written:
            assert np.array_equal(np.asarray(logged), np.asarray(written.convert("RGB")))


def test_the_table_contains_the_latest_values_of_the_groups(
    run: Path, records: list[dict[str, Any]], at_wandb: dict[str, list[Any]]
) -> None:
    (files,) = run.glob("wandb/offline-run-*/files")
    table = json.loads((files / at_wandb["val/groups.path"][-1]).read_text())
    assert table["columns"] == [
        "group", "scale", "KL (nats)", "balancing factor", "active channels"
    ]  # fmt: skip
    columns = _columns(run)
    names = ("val/kl_group", "train/kl_balance", "val/active_channels")
    assert table["data"] == [
        [group, group, *(pytest.approx(columns[f"{name}/{group:02d}"][-1]) for name in names)]
        for group in (0, 1)
    ]
    for artifact in _of_type(records, "artifact"):  # uploaded later
        for content in artifact["manifest"]["contents"]:
            assert Path(content["local_path"]).is_relative_to(run)
            assert Path(content["local_path"]).is_file()


def test_settings_code_version_and_tags_are_recorded(
    run: Path, records: list[dict[str, Any]]
) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (config,) = _of_type(records, "config")
    assert config["update"] == settings
    assert settings["version"]
    (begun,) = _of_type(records, "run")
    assert begun["tags"] == ["mnist_5k", "tiny", "balanced", "spectral"]
    assert begun["job_type"] == "train"
    assert "run_group" not in begun
    (environment, *_) = _of_type(records, "environment")
    assert environment["program"] == "-m nvae_lightning.train"


def test_wandb_sync_finds_the_run(run: Path) -> None:
    (folder,) = run.glob("wandb/offline-run-*")
    result = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", str(folder)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "Would sync 1 run" in result.stdout + result.stderr


def test_the_logged_weight_norm_is_from_before_the_step(run: Path) -> None:
    logged = _columns(run)["train/weight_norm"]
    for step in (1, 2, 3):
        model = load_model(run / "checkpoints" / f"step{step:07d}.ckpt")
        squares = sum(float(p.detach().double().square().sum()) for p in model.parameters())
        assert logged[step] == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert len(set(logged)) == 4


def test_the_history_is_in_the_checkpoints(run: Path) -> None:
    columns = _columns(run)
    for step in (2, 4):
        path = run / "checkpoints" / f"step{step:07d}.ckpt"
        state = torch.load(path, weights_only=True)["callbacks"]["KLPerGroup"]
        assert state["steps"].tolist() == list(range(1, step + 1))
        for name, logged in (("rates", "kl_group"), ("balance", "kl_balance")):
            for group in (0, 1):
                expected = columns[f"train/{logged}/{group:02d}"][:step]
                assert state[name][:, group].tolist() == pytest.approx(expected)


def test_panels_show_all_logged_values(at_wandb: dict[str, list[Any]]) -> None:
    shown: set[str] = set()
    patterns: list[str] = []
    workspace = build_workspace("entity", "project", "name")
    for panel in [panel for section in workspace.sections for panel in section.panels]:
        settings = panel._to_model().model_dump()["config"]
        shown |= {*settings.get("metrics", ()), *settings.get("media_keys", ())}
        patterns += [settings["metric_regex"]] if settings.get("metric_regex") else []
        shown |= {getattr(panel, "table_name", "")}
    logged = {name.partition(".")[0] for name in at_wandb}
    aside = {"epoch", "trainer/global_step", "test/num_images", "test/nll_standard_error"}
    for name in logged - aside:
        if not name.startswith("_"):
            assert name in shown or any(re.search(p, name) for p in patterns), name
    assert all(any(re.search(p, name) for name in logged) for p in patterns)
    others = {  # of callbacks outside the defaults, and of W&B itself
        "test/fid", "test/temperatures", "train/peak_memory_gib",
        "train/diverged", "system/gpu.0.gpu", "system/gpu.0.memoryAllocated", "",
    }  # fmt: skip
    assert shown - others <= logged


@pytest.mark.slow
def test_jobs_of_a_sweep_are_runs_in_one_group(run_train: Run, tmp_path: Path) -> None:
    result = run_train(
        "-m", *TINY, "logger=default", "trainer.max_steps=2", "hydra.sweep.dir=sweep",
        "experiment=table4", "dataset=mnist_5k", "model=tiny", "model.hierarchy.num_groups=[1,1]",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    names = set()
    for job, residual in ((0, True), (1, False)):
        folder = tmp_path / "sweep" / str(job)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["model"]["residual_posterior"] is residual
        records = _records(folder)
        (begun,) = _of_type(records, "run")
        assert begun["run_group"] == "sweep"
        assert begun["tags"] == ["mnist_5k", "tiny", "balanced", "spectral", "table4"]
        assert begun["run_id"] == config["run_id"]
        assert _of_type(records, "exit")
        names.add(begun["run_id"])
    assert len(names) == 2


DASHBOARD = """
import sys
from nvae_lightning.cli.command import run
from nvae_lightning.dashboard import main
def attempt(override):
    sys.argv = ["dashboard", "entity=me", override]
    try:
        run(main)
    except SystemExit as exit:
        print(exit.code)
sys.modules["wandb_workspaces"] = None  # as if not installed
attempt("save=false")
del sys.modules["wandb_workspaces"]
for override in ("save=1", "save=false", "save=true"):
    attempt(override)
"""


def test_the_dashboard_is_written_without_a_network_and_errors_are_one_line(
    tmp_path: Path,
) -> None:
    environment = {name: value for name, value in QUIET.items() if not name.startswith("WANDB_")}
    # Without a login and without a network.
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:1"}
    result = run_python("-c", DASHBOARD, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    package, setting, written, again, unsaved = result.stdout.splitlines()
    assert package.startswith("error: the dashboard requires the package wandb-workspaces")
    assert package.endswith("pip install 'nvae-lightning[dashboard]'")
    assert setting.startswith("error: save: got 1, but it must be a valid boolean")
    path = re.fullmatch("written: '(.*/workspace.json)'", written)
    assert path
    assert again.startswith("written: ")
    assert unsaved.startswith("error: entity=me project=nvae_lightning: W&B did not save")
    assert "wandb login" in unsaved
    spec = json.loads(Path(path[1]).read_text())
    assert (spec["entity"], spec["project"]) == ("me", "nvae_lightning")
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [
        "Likelihood", "KL per group", "Balancing", "Active channels", "Penalties and schedules",
        "Optimisation", "Pictures", "System and throughput",
    ]  # fmt: skip
    assert all(section["panels"] for section in sections)
