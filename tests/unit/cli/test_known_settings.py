"""Settings that nothing reads are refused, with the nearest name."""

from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.cli.known_settings import check_known, explain

CONF = CONFIG_ROOT / "conf"


def _check(command: str, *overrides: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = compose(command, list(overrides))
    check_known(config, command)


REFUSED = [
    ("train", "+experiments=x", "experiments: there is no such .* did you mean experiment?"),
    ("train", "+modle=tiny", "modle: .* did you mean model?"),
    ("train", "+max_steps=5", "max_steps: .* did you mean trainer.max_steps?"),
    ("train", "++foo.bar=1", "foo: there is no such setting"),
    ("train", "+mode=prior", "mode: there is no such setting"),
    ("train", "+launcher.n_jobs=2", "launcher: there is no such setting"),
    ("train", "+dataset.crp=1", "dataset.crp: .* did you mean crop?"),
    ("train", "+recipe.lr=1", "recipe.lr: there is no such setting"),
    ("train", "+choices.mdl=1", "choices.mdl: .* did you mean choices.model?"),
    ("train", "++trainer.max_stps=5", "trainer.max_stps: .* did you mean max_steps?"),
    ("train", "++model.foo=1", "model.foo: .* takes no such setting; it takes image"),
    ("train", "+callbacks.guard.patiance=3", "guard.patiance: .* did you mean patience?"),
    ("evaluate", "+foo=1", "foo: there is no such setting"),
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


def test_a_plus_is_recommended_only_where_it_helps() -> None:
    for override, expected in (
        ("modle=tiny", "did you mean model?"),
        ("trainer.max_stps=1", "did you mean max_steps?"),
        ("mode=prior", "there is no such setting"),
        ("callbacks.mine.refresh=1", "must have a _target_"),
    ):
        key = override.partition("=")[0]
        message = f"Could not override '{key}'. To append to your config use +{override}"
        explained = explain(message, "train", ["seed=1", override])
        assert expected in str(explained)
        assert "+" not in str(explained)
    message = "Could not override 'trainer.enable_autolog_hparams'."
    explained = explain(message, "train", ["trainer.enable_autolog_hparams=true"])
    assert explained is not None
    assert explained.endswith("add it with +trainer.enable_autolog_hparams=true")
    assert explain("another error", "train", ["seed=1"]) is None
