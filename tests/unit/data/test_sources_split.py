import random

import pytest

from nvae_lightning.data.readers import Wanted
from nvae_lightning.data.readers.base import by_split, check_splits, split_name

NAMES = [f"{index:02}.png" for index in range(20)]


def held_out(names: list[str], seed: int = 0) -> set[str]:
    return {names[index] for index in Wanted(8, 0.3, seed).split(names, "it")["test"]}


def test_a_seeded_split_is_disjoint_and_complete_and_in_order() -> None:
    split = Wanted(8, test_fraction=0.3, split_seed=0).split(NAMES, "it")
    assert list(split) == ["train", "test"]
    assert (len(split["train"]), len(split["test"])) == (14, 6)
    assert sorted(split["train"] + split["test"]) == list(range(20))
    assert all(indices == sorted(indices) for indices in split.values())


def test_a_seeded_split_never_changes() -> None:
    split = Wanted(8, test_fraction=0.25, split_seed=0).split(NAMES[:12], "it")
    assert split["test"] == [5, 8, 10]
    repeated = Wanted(8, test_fraction=0.25, split_seed=7).split(
        [f"{n % 2}/{n // 2}.jpg" for n in range(8)], "it"
    )
    assert repeated["test"] == [1, 7]


def test_a_seeded_split_depends_on_the_seed() -> None:
    assert len({frozenset(held_out(NAMES, seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    "names", [NAMES, [f"{n % 2}/{n // 2}.jpg" for n in range(20)], ["a.jpg", "a.png", "b/a.png"]]
)
def test_a_seeded_split_does_not_depend_on_the_order_of_the_names(names: list[str]) -> None:
    for seed in range(5):
        shuffled = random.Random(seed).sample(names, len(names))
        assert held_out(shuffled) == held_out(names)


def test_a_seeded_split_does_not_depend_on_folders_and_suffixes_of_unique_names() -> None:
    moved = [f"photos/{index % 3}/{name[:-4]}.JPEG" for index, name in enumerate(NAMES)]
    expected = {name[:2] for name in held_out(NAMES)}
    assert {name.split("/")[-1][:2] for name in held_out(moved)} == expected


def test_images_of_one_name_in_two_folders_are_drawn_independently() -> None:
    names = [f"{folder}/{index}.png" for folder in "ab" for index in range(10)]
    drawn = held_out(names)
    assert len(drawn) == 6
    assert {name for name in drawn if name.startswith("a")} != {
        f"a/{name[2:]}" for name in drawn if name.startswith("b")
    }


def test_one_image_more_moves_at_most_one_of_the_others() -> None:
    for count in range(3, 20):
        fewer, more = held_out(NAMES[:count]), held_out(NAMES[: count + 1])
        assert len((fewer ^ more) - {NAMES[count]}) <= 1


def test_names_that_are_not_utf8_are_split() -> None:
    assert len(held_out(["a.png", "caf\udce9.png"])) == 1


@pytest.mark.parametrize("test_fraction", [0.01, 0.99])
def test_neither_part_of_a_seeded_split_is_empty(test_fraction: float) -> None:
    split = Wanted(8, test_fraction, split_seed=0).split(["a.png", "b.png", "c.png"], "it")
    assert min(map(len, split.values())) == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_leaves_nothing_is_refused(fraction: float) -> None:
    message = rf"^dataset\.test_fraction: got {fraction}, .* 0 and 1.*test_fraction=0\.1$"
    with pytest.raises(ValueError, match=message):
        Wanted(8, fraction, split_seed=0)


@pytest.mark.parametrize(("names", "number"), [([], "no images"), (["a.png"], "one image only")])
def test_fewer_than_two_images_cannot_be_split(names: list[str], number: str) -> None:
    with pytest.raises(ValueError, match=rf"^it holds {number}, but a split requires two; add"):
        Wanted(8, 0.5, split_seed=0).split(names, "it")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[
            (name, "train")
            for name in ("train", "Train", "TRAINING", "train_32x32", "train-64x64")
        ],
        *[(name, "test") for name in ("test", "testing", "Test")],
        *[(name, "validation") for name in ("val", "valid", "validation", "VALID", "valid_32x32")],
        *[(name, None) for name in ("", "trains", "my train", "train2", "valley", "latest", "tr")],
    ],
)
def test_names_of_splits_are_recognised(name: str, split: str | None) -> None:
    assert split_name(name) == split


def test_a_duplicate_split_is_reported() -> None:
    message = r"^'x' has the split 'train' twice, 'a' and 'b'; remove one of them$"
    with pytest.raises(ValueError, match=message):
        by_split([("train_32x32", "a"), ("other", "c"), ("train_64x64", "b")], "'x'")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["test", "train"], {"train": "train", "test": "test"}),
        (["validation", "train"], {"train": "train", "test": "validation"}),
        (
            ["test", "validation", "train"],
            {name: name for name in ("train", "validation", "test")},
        ),
    ],
)
def test_a_validation_split_is_the_test_split_if_there_is_none(
    given: list[str], expected: dict[str, str]
) -> None:
    splits = check_splits({name: name for name in given}, "'x'")
    assert list(splits.items()) == list(expected.items())


@pytest.mark.parametrize(
    ("given", "present", "absent"),
    [
        (["train"], "train", "test"),
        (["test"], "test", "train"),
        (["validation"], "validation", "train"),
        (["validation", "test"], "validation", "train"),
    ],
)
def test_a_missing_split_is_reported(given: list[str], present: str, absent: str) -> None:
    message = rf"^'x' has a split '{present}' but no split '{absent}'; add '{absent}', or else$"
    with pytest.raises(ValueError, match=message):
        check_splits(dict.fromkeys(given, 0), "'x'", ", or else")
