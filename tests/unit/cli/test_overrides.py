"""Overrides are quoted so that Hydra reads what was meant, and merged by their keys."""

import shlex

import pytest
from hydra.errors import OverrideParseException

from nvae_lightning.cli.overrides import how_to_quote, merge, parse, without_keys

VALUES = [
    "epoch=1-step=20.ckpt", "photos_ü", "a b", "a,b", "a(1)", "(a)", "C:\\data\\", "a'b", 'a"b',
    "a\\'b", 'a\\"b', "😀", "~/x", "a{b", "#x", "a;b", "a'b\"c", "a]", "`ls`", "a=$x", "x&y", "\\",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_a_quoted_override_is_read_as_the_text_that_was_given(value: str) -> None:
    quoted = how_to_quote(f"ckpt_path={value}")
    assert quoted is not None
    (argument,) = shlex.split(quoted)
    (override,) = parse([argument])
    assert override.key_or_group == "ckpt_path"
    assert override.value() == value


def test_a_quoted_list_stays_a_list() -> None:
    quoted = how_to_quote("runs=[a=b,ü]")
    assert quoted is not None
    (override,) = parse(shlex.split(quoted))
    assert override.value() == ["a=b", "ü"]


def test_what_has_no_key_is_not_quoted() -> None:
    assert how_to_quote("photos ü") is None
    with pytest.raises(OverrideParseException):
        parse(["ckpt_path=a=b"])


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
