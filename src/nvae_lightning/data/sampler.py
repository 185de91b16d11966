"""Order of the images: the same on any number of ranks, and after a resume."""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

Batch = TypeVar("Batch", covariant=True)

_NUM_AHEAD = 2  # batches


class ShardedSampler(DistributedSampler[int]):
    """One rank's share of a split.

    Batch ``k`` of all ranks together has the images ``k·G`` to ``(k + 1)·G`` of the order, with
    ``G = batch_size · num_ranks``. The images of an optimiser step therefore depend on `seed` and
    on the epoch, not on the number of ranks. In training, the images that do not fill a last batch
    are left out, different ones in every epoch. In evaluation each image is used once, so one rank
    may have one image more than another.

    Lightning does not replace a `DistributedSampler`.

    Args:
        num_images: Number of images in the split.
        batch_size: Number of images per batch and rank.
        train: Whether to shuffle in every epoch and use only full batches.
        seed: Seed of the order.
        rank: Index of this rank.
        num_ranks: Number of ranks.
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
            range(num_images),  # pyright: ignore[reportArgumentType] -- only its length is used
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
        """Number of images in one batch of all ranks."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        """Return this rank's number of images in a whole epoch."""
        return len(range(self.rank, self._num_used, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        """Return the indices of this epoch without the first `start` of all ranks."""
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
    """DataLoader that reads ahead in a thread if it has no worker processes.

    A copy from an array or a memory map releases Python's lock, and is faster than the transfer
    from another process (experiments/results/loader-2-cores.json).
    """

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Yield the batches of an epoch."""
        batches = super().__iter__()
        if self.num_workers > 0:
            yield from batches
            return
        thread = ThreadPoolExecutor(1, "loader")
        try:
            coming = deque(thread.submit(next, batches, None) for _ in range(_NUM_AHEAD))
            while (batch := coming.popleft().result()) is not None:
                coming.append(thread.submit(next, batches, None))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)


class ResumableLoader(ReadingAhead[Batch]):
    """Loader that resumes within an epoch, also in another process.

    An iteration yields the rest of the epoch. The position counts the images of all ranks, so
    the number of ranks may change. If no batch starts there, the loader starts with the previous
    batch and repeats some images in that epoch.

    The loader counts epochs itself: Lightning only sets the first, and after a resume from the end
    of an epoch its count may be one ahead, or one batch behind.

    Attributes:
        limit: Number of batches per epoch; infinity stands for all.
    """

    limit: float = math.inf
    _epoch: int | None = None  # None before the first batch
    _num_images = 0

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Yield the rest of this epoch."""
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
        """Return the position in the epoch."""
        epoch = getattr(self.sampler, "epoch", 0) if self._epoch is None else self._epoch
        return {"epoch": epoch, "num_images": self._num_images}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a position, or from the next epoch if no batch of that one is left."""
        epoch, num_images = state["epoch"], state["num_images"]
        if isinstance(self.sampler, ShardedSampler):
            num_batches = num_images // self.sampler.global_batch_size
            num_images = num_batches * self.sampler.global_batch_size
            if num_batches >= min(len(self), self.limit):
                epoch, num_images = epoch + 1, 0
        self._epoch, self._num_images = epoch, num_images
