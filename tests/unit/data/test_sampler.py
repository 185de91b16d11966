import threading
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import Dataset

from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.readers import ArraySource, Splits
from nvae_lightning.data.sampler import ReadingAhead, ShardedSampler
from nvae_lightning.utilities.image import Image as ImageFormat

# Here a resumed training saves no checkpoints, unlike the first one.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

NUM_TRAIN, NUM_TEST, BATCH = 22, 9, 4
STEPS = NUM_TRAIN // BATCH  # per epoch
Batches = list[list[int]]


class Numbered(ImageDataModule):
    """Every pixel of image i is i."""

    def __init__(self, **settings: Any) -> None:
        defaults = {"batch_size": BATCH, "image": ImageFormat(1, 4, 8)}
        super().__init__(**{**defaults, **settings})

    @cached_property
    def _sources(self) -> Splits:
        images = np.arange(NUM_TRAIN + NUM_TEST, dtype=np.uint8).repeat(16).reshape(-1, 4, 4, 1)
        parts = {"train": images[:NUM_TRAIN], "test": images[NUM_TRAIN:]}
        return Splits("numbers", {name: ArraySource(part) for name, part in parts.items()})


def numbers(batch: Tensor) -> list[int]:
    """Numbers of the images of a batch, before or after its conversion to the model's input."""
    pixels = batch[:, 0, 0, 0]
    return (pixels * 255 if pixels.is_floating_point() else pixels).round().int().tolist()


def shards(
    num_images: int, batch_size: int, num_ranks: int, *, train: bool, seed: int = 0, epoch: int = 0
) -> list[Batches]:
    """Return the batches of every rank."""
    result = []
    for rank in range(num_ranks):
        sampler = ShardedSampler(
            num_images, batch_size=batch_size, train=train, seed=seed, rank=rank,
            num_ranks=num_ranks,
        )  # fmt: skip
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(indices) == len(sampler)
        result.append([indices[i : i + batch_size] for i in range(0, len(indices), batch_size)])
    return result


def sets(ranks: Sequence[Batches]) -> list[set[int]]:
    """Return the images of all ranks in each step."""
    return [{i for batch in step for i in batch} for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_a_step_sees_the_same_images_on_any_number_of_ranks(num_ranks: int) -> None:
    alone = shards(100, 12, 1, train=True)
    together = shards(100, 12 // num_ranks, num_ranks, train=True)
    assert sets(together) == sets(alone)
    assert len(alone[0]) == 8


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_training_batches_are_full_and_no_image_repeats(num_ranks: int) -> None:
    ranks = shards(101, 5, num_ranks, train=True)
    given = [index for batches in ranks for batch in batches for index in batch]
    assert len(set(given)) == len(given) == 101 // (5 * num_ranks) * 5 * num_ranks
    assert {len(batch) for batches in ranks for batch in batches} == {5}


def test_the_order_differs_between_epochs_and_seeds() -> None:
    orders = [
        str(shards(50, 5, 1, train=True, seed=seed, epoch=epoch))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 9


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = shards(50, 5, 2, train=True, seed=3, epoch=7)
    torch.manual_seed(1)
    np.random.seed(1)
    assert shards(50, 5, 2, train=True, seed=3, epoch=7) == first


def test_different_images_are_left_out_in_every_epoch() -> None:
    left_out = set()
    for epoch in range(4):
        (batches,) = shards(22, 4, 1, train=True, epoch=epoch)
        left_out.add(frozenset(range(22)) - {i for batch in batches for i in batch})
    assert {len(images) for images in left_out} == {2}
    assert len(left_out) > 1


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_images", [4, 5, 11, 12, 13])
def test_evaluation_counts_every_image_once(num_images: int, num_ranks: int) -> None:
    ranks = shards(num_images, 2, num_ranks, train=False, epoch=3)
    given = [index for batches in ranks for batch in batches for index in batch]
    assert sorted(given) == list(range(num_images))


def loader(rank: int = 0, num_ranks: int = 1, **settings: Any) -> Any:
    """Loader of training images, as one of several ranks."""
    data = Numbered(**settings)
    trainer = SimpleNamespace(world_size=num_ranks, global_rank=rank, limit_train_batches=1.0)
    data.trainer = trainer  # pyright: ignore[reportAttributeAccessIssue]
    return data.train_dataloader()


def take(source: Any, num_batches: int | None = None) -> Batches:
    """Take at most as many batches as a training uses."""
    batches = iter(source)
    if num_batches is None:
        return [numbers(batch) for batch in batches]
    return [numbers(next(batches)) for _ in range(num_batches)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("position", range(STEPS))
def test_a_restored_position_gives_exactly_the_rest_of_the_epoch(
    position: int, workers: int
) -> None:
    uninterrupted = loader()
    epochs = [take(uninterrupted) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [STEPS] * 3
    assert len({str(epoch) for epoch in epochs}) == 3

    first = loader(num_workers=workers)
    assert take(first) == epochs[0]
    assert take(first, position) == epochs[1][:position]
    resumed = loader(num_workers=workers)
    resumed.load_state_dict(first.state_dict())
    assert take(resumed) == epochs[1][position:]
    assert take(resumed) == epochs[2]


def test_the_position_after_a_whole_epoch_is_the_start_of_the_next() -> None:
    first = loader()
    take(first, STEPS)
    assert first.state_dict() == {"epoch": 1, "num_images": 0}


def test_one_rank_resumes_where_two_stopped() -> None:
    pair = [loader(rank, 2, batch_size=2) for rank in range(2)]
    begun = [take(one, 3) for one in pair]
    assert pair[0].state_dict() == pair[1].state_dict()
    resumed = loader()
    resumed.load_state_dict(pair[0].state_dict())
    alone = take(loader())
    assert sets(begun) + sets([take(resumed)]) == sets([alone])


def test_larger_batches_resume_at_the_last_batch_boundary() -> None:
    first = loader(batch_size=2)
    begun = take(first, 5)
    resumed = loader(batch_size=4)
    resumed.load_state_dict(first.state_dict())
    images = [image for batch in (*begun[:4], *take(resumed)) for image in batch]
    assert images == [image for batch in take(loader()) for image in batch]


def test_a_limit_ends_each_epoch_early() -> None:
    whole, limited = loader(), loader()
    epochs = [take(whole) for _ in range(2)]
    limited.limit = 3
    assert [take(limited) for _ in range(2)] == [epoch[:3] for epoch in epochs]


class Noting(Dataset[int]):
    """Record which thread read which index; the sixth is unreadable."""

    def __init__(self) -> None:
        self.read: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == 5:
            raise OSError("the disk is gone")
        self.read.append((index, threading.current_thread().name))
        return index


def test_a_thread_reads_the_next_batches_while_one_is_used() -> None:
    dataset = Noting()
    batches = iter(ReadingAhead(dataset, batch_size=None))
    assert next(batches) == 0
    for _ in range(100):
        if len(dataset.read) == 3:
            break
        time.sleep(0.01)
    assert [index for index, _ in dataset.read] == [0, 1, 2]
    assert threading.current_thread().name not in {name for _, name in dataset.read}


def test_an_error_of_the_thread_is_raised_when_its_batch_is_due() -> None:
    batches = iter(ReadingAhead(Noting(), batch_size=None))
    assert [next(batches) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_an_unfinished_epoch_leaves_no_thread() -> None:
    before = threading.active_count()
    batches = iter(ReadingAhead(Noting(), batch_size=None))
    next(batches)
    assert threading.active_count() == before + 1
    del batches
    assert threading.active_count() == before


class Recorder(LightningModule):
    """Record the images of each training step, and the steps before each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: Batches = []
        self.validated: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(numbers(batch))
        return self.weight * batch.mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(
    folder: Path,
    *callbacks: ModelCheckpoint,
    ckpt_path: Path | None = None,
    last: Path | None = None,
    num_workers: int = 0,
    **options: Any,
) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        **{"limit_val_batches": 0, **options},
        accelerator="cpu", devices=1, default_root_dir=folder, logger=False,
        callbacks=list(callbacks), enable_checkpointing=bool(callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, Numbered(num_workers=num_workers), ckpt_path=ckpt_path)
    if last is not None:
        trainer.save_checkpoint(last)
    return module


def checkpoints(folder: Path) -> dict[int, Path]:
    """Files that `ModelCheckpoint` wrote, by their step."""
    return {int(path.stem): path for path in sorted(folder.glob("*.ckpt"))}


def saving(folder: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, "{step:02d}", auto_insert_metric_name=False, save_top_k=-1, **when
    )


VALIDATIONS = {
    "never": {"limit_val_batches": 0},
    "each epoch": {"limit_val_batches": 1.0},
    "each second epoch": {"limit_val_batches": 1.0, "check_val_every_n_epoch": 2},
    "within epochs": {"limit_val_batches": 1.0, "val_check_interval": 2},
}


@pytest.mark.parametrize("stop", [{"max_epochs": 3}, {"max_steps": 15}], ids=str)
@pytest.mark.parametrize("validation", VALIDATIONS)
def test_a_training_resumed_after_any_step_sees_the_same_batches(
    tmp_path: Path, stop: dict[str, int], validation: str
) -> None:
    options = {**stop, **VALIDATIONS[validation]}
    whole = fit(tmp_path, saving(tmp_path, every_n_train_steps=1), **options)
    assert len(whole.seen) == 3 * STEPS
    found = checkpoints(tmp_path)
    assert list(found) == list(range(1, 3 * STEPS + 1))
    for step, path in found.items():
        resumed = fit(tmp_path, ckpt_path=path, **options)
        assert resumed.seen == whole.seen[step:], step
        later = [when for when in whole.validated if when > step]
        assert resumed.validated == later, step


@pytest.mark.parametrize("stop", [{"max_epochs": 3}, {"max_steps": 15}], ids=str)
@pytest.mark.parametrize("validation", VALIDATIONS)
@pytest.mark.parametrize("after_training_epoch", [True, False])
def test_a_training_resumed_from_the_end_of_an_epoch_sees_the_same_batches(
    tmp_path: Path, stop: dict[str, int], validation: str, after_training_epoch: bool
) -> None:
    options = {**stop, **VALIDATIONS[validation]}
    callback = saving(tmp_path, save_on_train_epoch_end=after_training_epoch)
    whole = fit(tmp_path, callback, **options)
    found = checkpoints(tmp_path)
    expected = {STEPS, 2 * STEPS, 3 * STEPS} if after_training_epoch else set(whole.validated)
    assert set(found) == expected
    for step, path in found.items():
        assert fit(tmp_path, ckpt_path=path, **options).seen == whole.seen[step:], step


def test_two_workers_resume_like_zero(tmp_path: Path) -> None:
    whole = fit(tmp_path, saving(tmp_path, every_n_train_steps=1), max_epochs=3)
    for step in (2, STEPS, 8):
        path = checkpoints(tmp_path)[step]
        resumed = fit(tmp_path, ckpt_path=path, max_epochs=3, num_workers=2)
        assert resumed.seen == whole.seen[step:], step


@pytest.mark.parametrize("limit", [3, 0.6])
def test_epochs_that_are_cut_short_are_resumed_exactly(tmp_path: Path, limit: float) -> None:
    options = {"max_epochs": 3, "limit_train_batches": limit}
    whole = fit(tmp_path, saving(tmp_path, every_n_train_steps=1), **options)
    assert len(whole.seen) == 9
    for step, path in checkpoints(tmp_path).items():
        assert fit(tmp_path, ckpt_path=path, **options).seen == whole.seen[step:], step


def test_a_training_in_many_pieces_sees_the_same_batches(tmp_path: Path) -> None:
    whole = fit(tmp_path, max_steps=15)
    seen, path = [], None
    for steps in (2, 3, 5, 9, 10, 13, 15):
        last = tmp_path / f"{steps}.ckpt"
        seen += fit(tmp_path, ckpt_path=path, max_steps=steps, last=last).seen
        path = last
    assert seen == whole.seen


def test_a_finished_training_continues_with_the_next_epochs(tmp_path: Path) -> None:
    whole = fit(tmp_path, max_epochs=3)
    last = tmp_path / "last.ckpt"
    first = fit(tmp_path, max_epochs=1, last=last)
    assert first.seen + fit(tmp_path, max_epochs=3, ckpt_path=last).seen == whole.seen


def test_loaders_reloaded_every_epoch_continue_with_the_next_epoch(tmp_path: Path) -> None:
    again = fit(tmp_path, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert again.seen == fit(tmp_path, max_epochs=3).seen


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled:UserWarning")
def test_overfitting_takes_the_same_batches_in_every_epoch(tmp_path: Path) -> None:
    module = fit(tmp_path, max_epochs=3, overfit_batches=2)
    assert module.seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3
