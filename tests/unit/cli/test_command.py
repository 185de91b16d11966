"""Commands share the trainer's settings, name their folders and describe themselves."""

import importlib
import inspect
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.cli.nvae import list_commands
from nvae_lightning.training.ranks import make_trainer

CONF = str(CONFIG_ROOT / "conf")


def _compose(name: str, *overrides: str) -> Any:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(name, list(overrides), return_hydra_config=True)


def test_run_folders_are_named_by_more_than_the_second() -> None:
    for name in ("train", "evaluate", "sample", "score", "benchmark", "report", "dashboard"):
        text = (CONFIG_ROOT / "conf" / f"{name}.yaml").read_text()
        assert text.count("${now:") == text.count("-%S-%f}") == 2


@pytest.mark.parametrize("name", ["train", "evaluate", "score", "benchmark"])
def test_every_command_knows_the_same_settings_of_the_trainer(name: str) -> None:
    parameters = inspect.signature(make_trainer).parameters
    trainer = _compose(name, "trainer.fast_dev_run=true", "trainer.limit_val_batches=1").trainer
    for key in ("limit_train_batches", "profiler", "gradient_clip_val"):
        assert trainer[key] == parameters[key].default
    assert set(trainer) - {"_target_"} <= set(parameters)


def test_every_config_says_what_its_command_does() -> None:
    for name in list_commands():
        first, *_ = (CONFIG_ROOT / "conf" / f"{name}.yaml").read_text().splitlines()
        assert f": nvae {name} " in first


@pytest.mark.parametrize("name", ["train", "convert"])
def test_help_begins_with_what_a_command_does_and_fits_two_screens(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    with pytest.raises(SystemExit) as end:
        run(importlib.import_module(f"nvae_lightning.{name}").main)
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert f": nvae {name} " in lines[0]
    assert "SETTINGS" in lines
    assert len(lines) < 80


@pytest.mark.filterwarnings("ignore")
def test_a_search_continues_after_failed_and_non_finite_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trial(config: Any) -> float:
        if config.table == 1:
            raise ValueError("table: got 1")
        return math.nan if config.table == 2 else 0.5

    overrides = ["table=choice(1,2,3)", "runs=x", f"hydra.sweep.dir={tmp_path}"]
    sampler = ["hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=0"]
    search = ["-m", "hydra/sweeper=optuna", *sampler, "hydra.sweeper.n_trials=10"]
    monkeypatch.setattr(sys, "argv", ["report", *search, *overrides])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    run(command("report")(trial))
    errors = capsys.readouterr().err
    assert "error: table: got 1" in errors
    assert "error: the result is nan" in errors
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert (best["best_params"]["table"], best["best_value"]) == (3, 0.5)
