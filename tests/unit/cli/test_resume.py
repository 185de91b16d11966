"""A resume uses the settings of its run, but runs no code that they name."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from nvae_lightning.cli.resume import (
    check_same,
    run_of,
    with_saved_overrides,
)

SAVED = [
    "dataset=mnist",
    "model=tiny",
    "trainer.max_steps=2",
    "~callbacks.pictures",
    "ckpt_path=last",
]
SETTINGS: dict[str, Any] = {
    "choices": {"dataset": "mnist", "model": "tiny"},
    "run_dir": "/elsewhere/run",
    "trainer": {"max_steps": 2, "where": "/elsewhere/run/checkpoints"},
    "dataset": {"root": "a", "batch_size": 4, "image": {"size": 28}, "crop": None},
    "model": {"channels": 8},
    "overrides": SAVED,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a run with settings and a checkpoint."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    _save(folder, SETTINGS)
    return folder


def _save(run: Path, settings: object) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump(settings))


def _merged(*overrides: str, is_sweep: bool = False) -> list[str]:
    return with_saved_overrides(overrides, is_sweep=is_sweep)


def test_a_resume_begins_with_the_overrides_of_its_run(run: Path) -> None:
    expected = ["dataset=mnist", "model=tiny", "~callbacks.pictures"]
    last = [f"hydra.run.dir={run}", "ckpt_path=last", "trainer.max_steps=4"]
    assert _merged(*last) == [*expected, *last, "hydra.mode=RUN"]
    assert _merged(*_merged(*last)) == _merged(*last)
    for place in (run, run / "checkpoints", run / "checkpoints" / "last.ckpt"):
        assert run_of(place) == run
        given = [f"ckpt_path={place}", "trainer.max_steps=4"]
        assert _merged(*given) == [*expected, *given, "hydra.mode=RUN"]
        assert _merged(*given, is_sweep=True) == [*expected, *given]


def test_overrides_are_kept_unless_one_run_is_resumed(run: Path) -> None:
    for overrides in (
        ["seed=1"],
        ["ckpt_path=last"],
        [f"hydra.run.dir={run}"],
        ["ckpt_path=gone.ckpt"],
        [f"ckpt_path={run}", "hydra.job.name=train_ddp_process_1"],
        [f"hydra.run.dir={run.parent}/none", "ckpt_path=last"],
    ):
        assert _merged(*overrides) == overrides
    sweep = [f"hydra.run.dir={run}", "ckpt_path=last"]
    assert _merged(*sweep, is_sweep=True) == sweep


HARMFUL = [
    "+callbacks.x._target_=os.system", "dataset._target_=os.system",
    "callbacks={x:{_target_:os.system}}", "+callbacks.x={y:[{_args_:[1]}]}",
    "dataset.root=${oc.env:HOME}", "model=../../evil", "dataset=/tmp/evil",
    "callbacks.checkpoint.dirpath=/home", "+trainer.default_root_dir=/home",
    "logger.wandb.settings.base_url=http://evil", "logger={wandb:{settings:{base_url:x}}}",
    "+hydra={searchpath:[/tmp]}", "+logger@hydra.x=csv", "kl={_target_:x}",
]  # fmt: skip


@pytest.mark.parametrize("override", HARMFUL)
def test_saved_overrides_that_name_code_or_places_are_refused(run: Path, override: str) -> None:
    _save(run, {**SETTINGS, "choices": {}, "overrides": [override]})
    with pytest.raises(ValueError, match="repeat: "):
        _merged(f"ckpt_path={run}")
    given = [f"ckpt_path={run}", override]
    assert _merged(*given) == [*given, "hydra.mode=RUN"]  # the user's own


@pytest.mark.parametrize(
    "override",
    [
        "dataset.root=../data", "model.hierarchy.num_groups=[1,2]", "optimizer.lr=0.1",
        "model.num_flows=${recipe.num_flows}", "model/cell@model.encoder_cell=regular",
        "logger.wandb.project=x", "~callbacks.wandb", "++trainer.max_time=null", "compile=true",
    ],
)  # fmt: skip
def test_ordinary_saved_overrides_are_accepted(run: Path, override: str) -> None:
    _save(run, {**SETTINGS, "overrides": [override, "hydra.searchpath=[/tmp]"]})
    given = f"ckpt_path={run}"
    assert _merged(given) == [override, given, "hydra.mode=RUN"]


@pytest.mark.parametrize("content", ["[1", "!!python/object/apply:os.system [touch x]", "text"])
def test_a_damaged_config_is_refused(run: Path, content: str) -> None:
    (run / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"config.yaml' is damaged"):
        _merged(f"ckpt_path={run}")


def test_saved_overrides_that_cannot_be_parsed_are_refused(run: Path) -> None:
    _save(run, {**SETTINGS, "overrides": ["kl={'_target_':x}"]})
    with pytest.raises(ValueError, match=r"config.yaml' is damaged"):
        _merged(f"ckpt_path={run}")


def _now(**changes: Any) -> Any:
    config = OmegaConf.merge(
        SETTINGS, {"run_dir": "/here", "trainer": {"where": "${run_dir}/checkpoints"}}
    )
    return OmegaConf.merge(config, changes)


def test_a_resume_may_move_the_run_and_its_data(run: Path) -> None:
    check_same(_now(), run, dataset=None)
    check_same(_now(dataset={"root": "b", "num_workers": 2, "batch_size": 8}), run, dataset=None)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"dataset": {"image": {"size": 32}}}, "dataset.image.size"),
        ({"dataset": {"crop": [1]}}, "dataset.crop"),
        ({"model": {"channels": 16}}, "model.channels"),
    ],
)
def test_other_data_or_another_model_requires_a_new_run(
    run: Path, change: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*start a new run"):
        check_same(_now(**change), run, dataset=None)


def test_a_checkpoint_without_its_run_requires_the_name_of_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add dataset=NAME"):
        check_same(_now(), tmp_path, dataset=None)
    check_same(_now(), tmp_path, dataset="mnist")
