"""Which image comes when: the same on any number of processes, and after a resume."""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from nvae_lightning.data.checks import needing_workers

Batch = TypeVar("Batch", covariant=True)

_NUM_AHEAD = 2  # batches


class ShardedSampler(DistributedSampler[int]):
    """One process's share of a split.

    Batch ``k`` of all processes together is the images ``k·G`` to ``(k + 1)·G`` of the order, with
    ``G = batch_size · num_ranks``: which images meet in an optimiser step depends on `seed` and
    on the epoch, not on how many processes share them. In training the images that do not fill a
    last batch are left out, others in every epoch; in evaluation each image is used once, so that
    one process may have an image more than another.

    It is a `DistributedSampler`, which Lightning leaves in place.

    Args:
        num_images: Images of the split.
        batch_size: Images per batch and process.
        train: Shuffle anew in every epoch and use full batches only.
        seed: Seed of the order.
        rank: Number of this process.
        num_ranks: Number of processes.
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int,
        train: bool,
        seed: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        super().__init__(
            range(num_images),  # pyright: ignore[reportArgumentType] -- it takes only its length
            num_replicas=num_ranks,
            rank=rank,
            shuffle=train,
            seed=seed,
        )
        self.num_images = num_images
        self.batch_size = batch_size
        self.train = train
        self.start = 0

    @property
    def global_batch_size(self) -> int:
        """Images per batch of all processes."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        """Return this process's number of images in a whole epoch."""
        return len(range(self.rank, self._num_used, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        """Return the indices of this epoch, the first `start` of all processes left out."""
        order: Any = range(self.num_images)
        if self.train:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images)
        return map(int, order[self.start + self.rank : self._num_used : self.num_replicas])

    @property
    def _num_used(self) -> int:
        if not self.train:
            return self.num_images
        return self.num_images // self.global_batch_size * self.global_batch_size


class ReadingAhead(DataLoader[Batch]):
    """A DataLoader that reads ahead also without worker processes: in a thread.

    Copying out of an array or a memory map holds no lock, and takes less time than a batch takes
    to come from another process (experiments/results/loader-2-cores.json).
    """

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Yield the batches of an epoch."""
        with needing_workers(self.num_workers):
            batches = super().__iter__()
            yield from _read_ahead(batches) if self.num_workers == 0 else batches


def _read_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    thread = ThreadPoolExecutor(1, "loader")
    try:
        coming = deque(thread.submit(next, batches, None) for _ in range(_NUM_AHEAD))
        while (batch := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, batches, None))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)


class ResumableLoader(ReadingAhead[Batch]):
    """A loader that goes on where it stopped, also in another training.

    An iteration yields what is left of the epoch. The position is counted in images of all
    processes, of which a resumed training may have another number. If its batches do not end
    there, it begins with the last that does, and so gives some images twice in that epoch.

    Lightning says which epoch is the first, but not which are the next: resumed from the end of
    an epoch its count may be one ahead, or one batch behind.

    Attributes:
        limit: Batches to give of each epoch; infinity stands for all.
    """

    limit: float = math.inf
    _epoch: int | None = None  # None before the first batch
    _num_images = 0

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Yield the batches that are left of this epoch."""
        sampler = self.sampler
        if not isinstance(sampler, ShardedSampler):  # Lightning's own, with overfit_batches
            yield from super().__iter__()
            return
        state = self.state_dict()
        sampler.epoch, sampler.start = state["epoch"], state["num_images"]
        for batch in super().__iter__():
            state = {**state, "num_images": state["num_images"] + sampler.global_batch_size}
            self.load_state_dict(state)
            yield batch
            if self._epoch != state["epoch"]:
                return

    def state_dict(self) -> dict[str, int]:
        """Return where the epoch stands."""
        epoch = getattr(self.sampler, "epoch", 0) if self._epoch is None else self._epoch
        return {"epoch": epoch, "num_images": self._num_images}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there; with the next epoch, where no batch is left of that one."""
        epoch, num_images = state["epoch"], state["num_images"]
        if isinstance(self.sampler, ShardedSampler):
            num_batches = num_images // self.sampler.global_batch_size
            num_images = num_batches * self.sampler.global_batch_size
            if num_batches >= min(len(self), self.limit):
                epoch, num_images = epoch + 1, 0
        self._epoch, self._num_images = epoch, num_images
