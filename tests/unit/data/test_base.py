import os
import pickle
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nvae_lightning.data import Image as ImageFormat
from nvae_lightning.data import ImageDataModule, base
from nvae_lightning.data.dataset import ImageDataset
from nvae_lightning.data.prepare import PARTIAL
from nvae_lightning.data.readers import ArraySource, Splits
from nvae_lightning.data.sampler import ReadingAhead
from nvae_lightning.data.summary import Summary

SETTINGS: dict[str, Any] = {
    "batch_size": 4, "image": ImageFormat(3, 8, 8), "validation_fraction": 0.0
}  # fmt: skip
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 22, 5, 10


class Made(ImageDataModule):
    """Every pixel of image i is i; test images follow the training images."""

    @cached_property
    def _sources(self) -> Splits:
        images = np.arange(NUM_TRAIN + NUM_TEST, dtype=np.uint8).repeat(192).reshape(-1, 8, 8, 3)
        parts = {"train": images[:NUM_TRAIN], "test": images[NUM_TRAIN:]}
        return Splits("numbers", {name: ArraySource(part) for name, part in parts.items()})


def made(**settings: Any) -> Made:
    return Made(**{**SETTINGS, **settings})


def from_root(root: Path | None, **settings: Any) -> ImageDataModule:
    return ImageDataModule(root=root, **{**SETTINGS, **settings})


def numbers(batches: list[Tensor]) -> list[int]:
    return torch.cat(batches)[:, 0, 0, 0].tolist()


def write_images(root: Path, **counts: int) -> None:
    """Write 8x8 PNGs of different greys into one folder per split."""
    grey = 0
    for split, count in counts.items():
        (root / split).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (grey,) * 3).save(root / split / f"{index:02d}.png")
            grey += 1


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Folder of images in three splits."""
    root = tmp_path / "source"
    write_images(root, train=NUM_TRAIN, val=NUM_VALIDATION, test=NUM_TEST)
    return root


@pytest.fixture
def prepared(tmp_path: Path, source: Path) -> Path:
    """Folder of the same images, prepared."""
    root = tmp_path / "prepared"
    from_root(root, num_workers=0).prepare(str(source))
    return root


def test_batched_access_equals_single_access() -> None:
    images = np.random.default_rng(0).integers(256, size=(6, 4, 4, 3), dtype=np.uint8)
    dataset = ImageDataset(images)
    indices = [4, 0, 5]
    assert len(dataset) == 6
    batch = dataset.__getitems__(indices)
    assert torch.equal(batch, torch.stack([dataset[index] for index in indices]))
    assert np.array_equal(batch.numpy(), images[indices].transpose(0, 3, 1, 2))


def test_training_batches_are_full_and_shuffled_in_every_epoch() -> None:
    loader = made().train_dataloader()
    first, second = list(loader), list(loader)
    assert [batch.shape for batch in first] == [(4, 3, 8, 8)] * (NUM_TRAIN // 4)
    assert len(set(numbers(first))) == 20
    assert numbers(first) != sorted(numbers(first))
    assert numbers(first) != numbers(second)


def test_the_seed_alone_determines_the_order_of_training_images() -> None:
    orders = [numbers(list(made(seed=seed).train_dataloader())) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_test_images_are_returned_in_order() -> None:
    batches = list(made().test_dataloader())
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert numbers(batches) == list(range(NUM_TRAIN, NUM_TRAIN + NUM_TEST))


def test_a_part_of_the_training_split_is_held_out_for_validation() -> None:
    splits = []
    for seed in (0, 1):  # of the training; the hold-out does not depend on it
        data = made(validation_fraction=0.2, seed=seed)
        data.setup("fit")
        assert len(data.train_set) == NUM_TRAIN - 4
        assert data.train_set is data.train_set
        parts = (data.train_set, data.validation_set)
        train, held_out = (numbers([d.__getitems__(range(len(d)))]) for d in parts if d)
        assert sorted(train + held_out) == list(range(NUM_TRAIN))
        assert numbers(list(data.val_dataloader())) == held_out
        splits.append(held_out)
    assert splits[0] == splits[1]
    other = made(validation_fraction=0.2, split_seed=1).val_dataloader()
    assert numbers(list(other)) != splits[0]
    assert len(made(validation_fraction=0.001).validation_set or ()) == 1


def test_without_a_hold_out_there_is_no_validation() -> None:
    data = made(validation_fraction=0)
    data.setup("fit")
    assert data.validation_set is None
    assert data.val_dataloader() == []
    assert len(data.train_set) == NUM_TRAIN


@pytest.mark.parametrize("place", ["source", "prepared"])
def test_a_validation_split_is_used_where_there_is_one(
    place: str, request: pytest.FixtureRequest
) -> None:
    data = from_root(request.getfixturevalue(place))
    data.setup("fit")
    start = NUM_TRAIN + NUM_VALIDATION
    assert numbers(list(data.val_dataloader())) == list(range(NUM_TRAIN, start))
    assert numbers(list(data.test_dataloader())) == list(range(start, start + NUM_TEST))
    assert len(data.train_set) == NUM_TRAIN


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prepared_images_give_the_same_batches_as_their_source(
    prepared: Path, source: Path, num_workers: int
) -> None:
    for name in ("train", "val", "test"):
        ours, theirs = (
            list(getattr(data, f"{name}_dataloader")())
            for data in (from_root(prepared, num_workers=num_workers), from_root(source))
        )
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True)), name


def test_prepared_images_are_memory_mapped_and_others_are_not(
    prepared: Path, source: Path
) -> None:
    assert isinstance(from_root(prepared).train_set.images, np.memmap)
    assert not isinstance(from_root(source).train_set.images, np.memmap)


def test_a_worker_gets_the_name_of_a_memory_map_instead_of_its_images(prepared: Path) -> None:
    dataset = from_root(prepared).train_set
    copy = pickle.loads(pickle.dumps(dataset))
    assert isinstance(copy.images, np.memmap)
    assert copy.images.filename == dataset.images.filename  # pyright: ignore
    assert np.array_equal(copy.images, dataset.images)


def test_images_in_memory_survive_a_copy_to_a_worker() -> None:
    dataset = made().train_set
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy.images, dataset.images)


def test_batches_are_read_ahead_by_a_thread_without_workers(prepared: Path) -> None:
    for name in ("train", "val", "test"):
        for settings, num_processes in (({}, 0), ({"num_workers": 0}, 0), ({"num_workers": 2}, 2)):
            loader = getattr(from_root(prepared, **settings), f"{name}_dataloader")()
            assert isinstance(loader, ReadingAhead)
            assert loader.num_workers == num_processes


@pytest.mark.parametrize("num_workers", [None, 2])
def test_loading_does_not_use_the_global_random_numbers(
    num_workers: int | None,
) -> None:
    state = torch.get_rng_state()
    list(made(num_workers=num_workers).train_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_pinned_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert made().train_dataloader().pin_memory is available


@pytest.mark.parametrize("flip", [True, False])
def test_batches_are_channels_last_in_memory_on_the_way_to_the_model(
    prepared: Path, flip: bool
) -> None:
    data = from_root(prepared, flip=flip, num_workers=0)
    batch = next(iter(data.train_dataloader()))
    for images in (batch, data.to_input(batch, train=True)):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert not images.is_contiguous()


def test_setup_decodes_only_the_splits_of_its_stage_and_only_once(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode_all: Callable[..., tuple[np.ndarray, Summary]] = base.decode_all

    def note(*arguments: Any) -> tuple[np.ndarray, Summary]:
        decoded.append(len(arguments[0]))
        return decode_all(*arguments)

    monkeypatch.setattr(base, "decode_all", note)
    data = from_root(source)
    data.prepare_data()
    assert decoded == []
    data.setup("fit")
    data.setup("fit")
    list(data.train_dataloader())
    assert decoded == [NUM_TRAIN, NUM_VALIDATION]
    data.setup("test")
    assert decoded == [NUM_TRAIN, NUM_VALIDATION, NUM_TEST]
    assert len(data.test_set) == NUM_TEST


def test_a_batch_becomes_float_levels_on_its_way_to_the_model() -> None:
    batch = torch.full((4, 3, 8, 8), 15, dtype=torch.uint8)
    images = made(image=ImageFormat(3, 8, 5)).on_after_batch_transfer(batch, 0)
    torch.testing.assert_close(images, torch.full((4, 3, 8, 8), 1 / 31))


def test_binarised_batches_contain_only_zeros_and_ones() -> None:
    batch = torch.full((4, 3, 8, 8), 127, dtype=torch.uint8)
    images = made(image=ImageFormat(3, 8, 1)).on_after_batch_transfer(batch, 0)
    assert images.dtype == torch.float32
    assert set(images.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("flip", "training", "flips"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_images_are_flipped_only_in_training_and_if_asked(
    flip: bool, training: bool, flips: bool
) -> None:
    data = made(flip=flip)
    data.trainer = SimpleNamespace(training=training)  # pyright: ignore[reportAttributeAccessIssue]
    batch = torch.arange(8, dtype=torch.uint8).expand(400, 3, 8, 8)
    images = data.on_after_batch_transfer(batch, 0)
    is_mirrored = images[:, 0, 0, 0] > 0
    assert 150 < is_mirrored.sum() < 250 if flips else not is_mirrored.any()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("batch_size", 0, r"dataset\.batch_size must be .* at least 1, got 0"),
        ("batch_size", True, r"dataset\.batch_size must be an integer .*, got True"),
        ("validation_fraction", 1, r"dataset\.validation_fraction: got 1, .* below 1"),
        ("num_workers", -1, r"dataset\.num_workers must be .* at least 0, got -1"),
        ("test_fraction", 1.0, r"dataset\.test_fraction: got 1\.0, .* between 0 and 1"),
        ("crop", [8, 0, 4, 4], r"dataset\.crop: got \[8, 0, 4, 4\], .* left < right"),
        ("interpolation", "best", r"dataset\.interpolation: got 'best', .* one of .*lanczos"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**{argument: value})


def as_one_of(num_ranks: int, data: ImageDataModule) -> ImageDataModule:
    trainer = SimpleNamespace(world_size=num_ranks, global_rank=0, limit_train_batches=1.0)
    data.trainer = trainer  # pyright: ignore[reportAttributeAccessIssue]
    return data


@pytest.mark.parametrize(("num_ranks", "batch_size", "most"), [(1, 23, 22), (4, 6, 5)])
def test_batches_larger_than_the_training_split_are_refused(
    num_ranks: int, batch_size: int, most: int
) -> None:
    as_one_of(num_ranks, made(batch_size=most)).train_dataloader()
    message = rf"dataset\.batch_size: got {batch_size} on each of {num_ranks} .* 22 .*={most} or"
    with pytest.raises(ValueError, match=message):
        as_one_of(num_ranks, made(batch_size=batch_size)).train_dataloader()


def test_more_ranks_than_images_to_evaluate_are_refused() -> None:
    as_one_of(NUM_TEST, made()).test_dataloader()
    with pytest.raises(ValueError, match=r"trainer\.devices: got 11, .* only 10 .*devices=10 or"):
        as_one_of(NUM_TEST + 1, made()).test_dataloader()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (ImageFormat(3, 16, 8), r"^dataset\.image\.size: got 16, .* 8; .*image\.size=8, or"),
        (ImageFormat(1, 8, 8), r"^dataset\.image\.channels: got 1, .* 3; .*channels=3, or"),
    ],
)
def test_prepared_images_of_another_format_are_refused(
    prepared: Path, source: Path, image: ImageFormat, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_root(prepared, image=image).prepare_data()
    assert str(prepared) in str(caught.value)
    assert str(source) in str(caught.value)


def test_unprepared_images_of_another_size_are_resized(source: Path) -> None:
    data = from_root(source, image=ImageFormat(1, 4, 8))
    data.setup("fit")
    assert data.train_set.images.shape == (NUM_TRAIN, 4, 4, 1)


def test_a_flipped_bit_is_found_before_a_training_unless_verify_is_off(
    prepared: Path,
) -> None:
    from_root(prepared).prepare_data()
    path = prepared / "train.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^dataset\.root: .*train\.npy' is damaged .*checksum"):
        from_root(prepared).prepare_data()
    from_root(prepared, verify=False).prepare_data()


def test_a_truncated_file_is_reported_without_verification(prepared: Path) -> None:
    os.truncate(prepared / "test.npy", 1000)
    with pytest.raises(ValueError, match=r"^dataset\.root: .*test\.npy' is damaged"):
        from_root(prepared, verify=False).setup("test")


def test_a_source_with_another_number_of_images_is_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageDataModule, "counts", {"train": NUM_TRAIN, "test": 1_000})
    message = (
        r"^dataset\.check_counts: 1,000 images are expected in the split 'test', but '.*' has 10; "
        r".*set dataset\.check_counts=false"
    )
    with pytest.raises(ValueError, match=message):
        from_root(source).prepare_data()
    with pytest.raises(ValueError, match=message):
        from_root(source.parent / "new").prepare(str(source))
    from_root(source, check_counts=False).prepare_data()


def test_a_source_too_large_for_memory_is_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (NUM_TRAIN + NUM_VALIDATION + NUM_TEST) * 8 * 8 * 3
    monkeypatch.setattr(base, "_MOST_MEMORY", size)
    from_root(source).prepare_data()
    monkeypatch.setattr(base, "_MOST_MEMORY", size - 1)
    message = r"^dataset\.root: the 37 images in .* nvae_lightning\.prepare .*source=.*/source "
    with pytest.raises(ValueError, match=message):
        from_root(source).prepare_data()


def test_a_missing_folder_is_reported_with_how_to_get_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ImageDataModule, "how_to_get", "ask a colleague")
    data = from_root(Path("data/here"))
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match=r"^dataset\.root: ") as caught:
        data.prepare_data()
    message = f"dataset.root: '{tmp_path}/data/here' does not exist; ask a colleague"
    assert str(caught.value) == message


def test_a_missing_folder_is_reported_with_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; set dataset\.root to a folder"):
        from_root(tmp_path / "none").prepare_data()


def test_an_interrupted_preparation_is_reported(tmp_path: Path) -> None:
    (tmp_path / PARTIAL).mkdir()
    with pytest.raises(ValueError, match=r"dataset.root: the preparation of .* was interrupted"):
        from_root(tmp_path).prepare_data()


def test_a_folder_in_the_home_is_found(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(source.parent))
    assert from_root(Path("~/source")).root == source


def test_an_unreadable_image_is_named(source: Path) -> None:
    (source / "train" / "05.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^dataset\.root: .*train/05\.png"):
        from_root(source, num_workers=0).setup("fit")


def test_a_missing_source_is_reported_as_the_source_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^source: '.*nowhere' does not exist"):
        from_root(tmp_path / "new").prepare(str(tmp_path / "nowhere"))


def test_a_preparation_records_its_settings(prepared: Path, source: Path) -> None:
    known = from_root(prepared).prepared["train"]
    assert known.source == str(source)
    expected = {"image_size": 8, "channels": 3, "crop": None, "interpolation": "lanczos"}
    assert expected.items() <= known.settings.items()


def test_a_missing_root_is_reported(source: Path) -> None:
    message = r"dataset\.root: got None, .*; set dataset\.root"
    with pytest.raises(ValueError, match=message):
        from_root(None).prepare_data()
    with pytest.raises(ValueError, match=message):
        from_root(None).prepare(str(source))
