"""Overrides are quoted so that Hydra reads the intended text, and are merged by key."""

import shlex

import pytest

from nvae_lightning.cli.overrides import how_to_write, merge, parse, without_keys


@pytest.mark.parametrize(
    "value", ["epoch=1-step=20.ckpt", "photos_ü", "a,b", "a(1)", "a'b", 'a"b', "a{b", "#x", "a=$x"]
)
def test_a_quoted_override_is_read_as_the_original_text(value: str) -> None:
    message = how_to_write(f"ckpt_path={value}")
    (argument,) = shlex.split(message.partition("the shell: ")[2])
    (override,) = parse([argument])
    assert override.key_or_group == "ckpt_path"
    assert override.value() == value


def test_an_override_has_a_key() -> None:
    assert "write KEY=VALUE" in how_to_write("photos ü")


def test_later_overrides_replace_earlier_ones_of_the_same_key() -> None:
    earlier = ["dataset=mnist", "model.num_flows=1", "~callbacks.pictures", "+trainer.max_time=1"]
    assert merge(earlier, ["model.num_flows=2", "trainer.max_time=2"]) == [
        "dataset=mnist", "~callbacks.pictures", "model.num_flows=2", "++trainer.max_time=2",
    ]  # fmt: skip
    assert merge(earlier, ["dataset=cifar10", "~callbacks.pictures"]) == [
        "model.num_flows=1", "+trainer.max_time=1", "dataset=cifar10", "~callbacks.pictures",
    ]  # fmt: skip
    cells = ["model/cell@model.encoder_cell=regular", "model/cell@model.decoder_cell=regular"]
    assert merge(cells, ["model/cell@model.decoder_cell=depthwise"]) == [
        cells[0], "model/cell@model.decoder_cell=depthwise",
    ]  # fmt: skip


def test_merging_twice_changes_nothing() -> None:
    once = merge(["a.b=1", "+c.d=2", "~e"], ["a.b=3", "f=4"])
    assert sorted(merge(["a.b=1", "+c.d=2", "~e"], once)) == sorted(once)


def test_some_keys_and_those_of_hydra_are_dropped() -> None:
    assert without_keys(["ckpt_path=last", "hydra.run.dir=x", "seed=1"], ["ckpt_path"]) == [
        "seed=1"
    ]
