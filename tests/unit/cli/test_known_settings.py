"""Settings that nothing reads are refused, with the nearest name."""

from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.cli.known_settings import check_known, refusal

CONF = CONFIG_ROOT / "conf"


def _check(command: str, *overrides: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = compose(command, list(overrides))
    check_known(config, command)


REFUSED = [
    ("train", "+experiments=x", "experiments: unknown setting; did you mean experiment?"),
    ("train", "+modle=tiny", "modle: .* did you mean model?"),
    ("train", "+max_steps=5", "max_steps: .* did you mean trainer.max_steps?"),
    ("train", "++foo.bar=1", "foo: unknown setting"),
    ("train", "+mode=prior", "mode: unknown setting"),
    ("train", "+launcher.n_jobs=2", "launcher: unknown setting"),
    ("train", "+dataset.crp=1", "dataset.crp: .* did you mean crop?"),
    ("train", "+recipe.lr=1", "recipe.lr: unknown setting"),
    ("train", "+choices.mdl=1", "choices.mdl: .* did you mean choices.model?"),
    ("train", "++trainer.max_stps=5", "trainer.max_stps: .* did you mean max_steps?"),
    ("train", "++model.foo=1", "model.foo: .* does not take it; choose from image"),
    ("train", "+callbacks.guard.patiance=3", "guard.patiance: .* did you mean patience?"),
    ("evaluate", "+foo=1", "foo: unknown setting"),
    ("evaluate", "+dataset.btch_size=1", "dataset.btch_size: .* did you mean dataset.batch_size?"),
    ("sample", "+temprature=1", "temprature: .* did you mean temperature?"),
    ("sample", "+recalibration.passes=1", "recalibration.passes: .* recalibration.num_passes?"),
    ("preview", "+foo=1", "dataset: none is chosen"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "override", "message"), REFUSED)
def test_a_setting_that_nothing_reads_is_refused(
    command: str, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _check(command, override)


@pytest.mark.parametrize(
    "overrides",
    [
        ("+callbacks.mine._target_=lightning.pytorch.Callback",),
        ("+logger.mine={_target_:lightning.pytorch.loggers.CSVLogger,save_dir:x}",),
        ("+width=8", "model.hierarchy.channels=${width}"),
        ("dataset._target_=builtins.dict", "+dataset.side=8"),
        ("++trainer.min_epochs=1",),
    ],
)  # fmt: skip
def test_a_setting_that_something_reads_may_be_added(overrides: tuple[str, ...]) -> None:
    _check("train", *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1.5", "seed: got 1.5, but it must be a valid integer"),
        ("seed=-1", "seed must be at least 0 and below 2"),
        ("seed=true", "seed: got true"),
        ("seed=[1,2]", r"seed: got \[1, 2\]"),
        ("compile=maybe", "compile: got 'maybe', but it must be a valid boolean"),
        ("num_importance_samples=x", "num_importance_samples: got 'x'"),
    ],
)
def test_settings_that_no_class_declares_have_the_type_of_their_default(
    override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _check("train", override)


def test_a_temperature_is_one_number_or_several() -> None:
    for value in ("1", "0.7", "[1,0.7]"):
        _check("sample", "ckpt_path=x", f"temperature={value}")
    with pytest.raises(ValueError, match="temperature: got 'warm'"):
        _check("sample", "ckpt_path=x", "temperature=warm")


def test_the_nearest_name_is_recommended() -> None:
    for name, nearest in (
        ("modle", "model"),
        ("trainer.max_stps", "trainer.max_steps"),
        ("latent_channels", "model.hierarchy.latent_channels"),
    ):
        assert f"did you mean {nearest}?" in refusal(name, "train")
    assert refusal("qqq", "train").endswith("nvae train --help lists the settings")
