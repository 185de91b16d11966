"""Jobs of a search may fail, and are told."""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict, read_write

from nvae_lightning.cli import command
from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.training.ranks import make_trainer

CONF = str(CONFIG_ROOT / "conf")


def _compose(name: str, *overrides: str) -> Any:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(name, list(overrides), return_hydra_config=True)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a search by Optuna, of which job 3 runs."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    config = _compose("train", "hydra/sweeper=optuna", f"hydra.sweep.dir={tmp_path}")
    assert config.hydra.sweeper.max_failure_rate == 1.0
    with read_write(config), open_dict(config):
        config.hydra.runtime.output_dir = str(tmp_path / "3")
        config.hydra.job.num = 3
    monkeypatch.setattr(HydraConfig.instance(), "cfg", config)
    return tmp_path


@pytest.mark.parametrize("result", [math.nan, math.inf])
def test_a_trial_without_a_finite_result_has_failed(sweep: Path, result: float) -> None:
    with pytest.raises(ValueError, match=f"the result is {result}"):
        command._run_trial(lambda config: result, {})
    assert (
        (sweep / command.FAILURES).read_text().startswith(f"3: ValueError: the result is {result}")
    )


def test_failed_trials_are_told_at_the_end(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object) -> float:
        raise RuntimeError("out of\nmemory")

    assert command._run_trial(lambda config: 1.5, {}) == 1.5
    assert not (sweep / command.FAILURES).exists()
    with pytest.raises(RuntimeError):
        command._run_trial(fail, {})
    command.Checks().on_multirun_end(HydraConfig.instance().cfg)
    assert "failed: 1 jobs (3)" in capsys.readouterr().out
    assert (sweep / command.FAILURES).read_text() == "3: RuntimeError: out of memory\n"
    command.Checks().on_multirun_start(HydraConfig.instance().cfg)
    assert not (sweep / command.FAILURES).exists()


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
