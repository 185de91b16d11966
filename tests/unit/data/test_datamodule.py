from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jaxtyping import UInt8
from torch import Tensor

from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.datamodule import ImageDataset

SETTINGS = {"batch_size": 4, "image_size": 8, "channels": 3, "bits": 8}
NUM_TRAIN, NUM_TEST = 22, 10


class Made(ImageDataModule):
    """Every pixel of image i is i; the test images count on after the training images."""

    loaded: list[bool]

    def load(self, train: bool) -> UInt8[Tensor, "count channel height width"]:
        self.loaded = [*getattr(self, "loaded", []), train]
        numbers = torch.arange(NUM_TRAIN + NUM_TEST, dtype=torch.uint8)
        numbers = numbers[:NUM_TRAIN] if train else numbers[NUM_TRAIN:]
        return numbers[:, None, None, None].repeat(1, 3, 8, 8)


def made(**settings: Any) -> Made:
    return Made(**{**SETTINGS, **settings})


def numbers(batches: list[Tensor]) -> list[int]:
    return torch.cat(batches)[:, 0, 0, 0].tolist()


def test_getting_many_items_equals_getting_each() -> None:
    dataset = ImageDataset(torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8))
    indices = [4, 0, 5]
    assert len(dataset) == 6
    assert torch.equal(
        dataset.__getitems__(indices), torch.stack([dataset[index] for index in indices])
    )


def test_training_batches_are_full_and_shuffled_anew_in_every_epoch() -> None:
    torch.manual_seed(0)
    loader = made().train_dataloader()
    first, second = list(loader), list(loader)
    assert [batch.shape for batch in first] == [(4, 3, 8, 8)] * (NUM_TRAIN // 4)
    assert len(set(numbers(first))) == 20
    assert numbers(first) != sorted(numbers(first))
    assert numbers(first) != numbers(second)


@pytest.mark.parametrize("name", ["val_dataloader", "test_dataloader"])
def test_evaluation_sees_every_test_image_once_and_in_order(name: str) -> None:
    batches = list(getattr(made(), name)())
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert numbers(batches) == list(range(NUM_TRAIN, NUM_TRAIN + NUM_TEST))


def test_two_workers_give_the_same_batches_as_none() -> None:
    epochs = []
    for num_workers in (0, 2):
        torch.manual_seed(0)
        epochs.append(numbers(list(made(num_workers=num_workers).train_dataloader())))
    assert epochs[0] == epochs[1]


def test_setup_loads_what_the_stage_needs_and_only_once() -> None:
    data = made()
    data.setup("test")
    assert data.loaded == [False]
    assert data.num_test_images == NUM_TEST
    data.setup("fit")
    data.setup("fit")
    list(data.train_dataloader())
    assert data.loaded == [False, True]
    assert data.num_train_images == NUM_TRAIN


def test_a_batch_becomes_float_levels_on_its_way_to_the_model() -> None:
    batch = torch.full((4, 3, 8, 8), 15, dtype=torch.uint8)
    images = made(bits=5).on_after_batch_transfer(batch, 0)
    torch.testing.assert_close(images, torch.full((4, 3, 8, 8), 1 / 31))


def test_binarised_batches_hold_zeros_and_ones_only() -> None:
    batch = torch.full((4, 3, 8, 8), 127, dtype=torch.uint8)
    images = made(binarize=True, bits=1).on_after_batch_transfer(batch, 0)
    assert images.dtype == torch.float32
    assert set(images.unique().tolist()) == {0.0, 1.0}


def test_binarised_images_of_several_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset\.image\.bits: got 5"):
        made(binarize=True, bits=5)


@pytest.mark.parametrize(
    ("flip", "training", "flips"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_images_are_flipped_only_in_training_and_if_asked(
    flip: bool, training: bool, flips: bool
) -> None:
    torch.manual_seed(0)
    data = made(flip=flip)
    data.trainer = SimpleNamespace(training=training)  # pyright: ignore[reportAttributeAccessIssue]
    batch = torch.arange(8, dtype=torch.uint8).expand(400, 3, 8, 8)
    images = data.on_after_batch_transfer(batch, 0)
    is_mirrored = images[:, 0, 0, 0] > 0
    assert 150 < is_mirrored.sum() < 250 if flips else not is_mirrored.any()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("batch_size", 0, r"dataset\.batch_size: got 0, .* at least 1"),
        ("batch_size", True, r"dataset\.batch_size: got True, .* whole number"),
        ("image_size", 0, r"dataset\.image\.size: got 0, .* at least 1"),
        ("channels", 2, r"dataset\.image\.channels: got 2, .* 1 \(grey\) or 3 \(colour\)"),
        ("bits", 0, r"dataset\.image\.bits: got 0, .* from 1 to 8"),
        ("bits", 9, r"dataset\.image\.bits: got 9, .* from 1 to 8"),
        ("bits", True, r"dataset\.image\.bits: got True"),
        ("num_workers", -1, r"dataset\.num_workers: got -1, .* at least 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused(argument: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**{argument: value})


def test_a_batch_larger_than_the_training_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset\.batch_size: got 23, .* only 22 .*=22 or less"):
        made(batch_size=23).train_dataloader()


def test_another_image_size_than_the_data_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset\.image\.size: got 9, .* 8x8; .*size=8"):
        made(image_size=9).setup("fit")


def test_another_number_of_channels_than_the_data_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset\.image\.channels: got 1, .*channels=3"):
        made(channels=1).setup("fit")


def test_a_root_that_is_needed_but_not_given_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"dataset\.root: got None, .*; set dataset\.root=FOLDER"):
        _ = made().folder
