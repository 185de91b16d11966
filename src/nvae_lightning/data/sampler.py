"""Which image comes when: the same on any number of processes, and again after a resume."""

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

Batch = TypeVar("Batch", covariant=True)


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
        start, self.start = self.start, 0
        order: Any = range(self.num_images)
        if self.train:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images)
        return map(int, order[start + self.rank : self._num_used : self.num_replicas])

    @property
    def _num_used(self) -> int:
        if not self.train:
            return self.num_images
        return self.num_images // self.global_batch_size * self.global_batch_size


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader whose position in the epoch Lightning saves and restores.

    The position is counted in images of all processes, so that a resumed training may have
    another number of them.
    """

    _num_given = 0

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Yield the batches that are left of this epoch."""
        sampler = self.sampler
        if isinstance(sampler, ShardedSampler):
            self._num_given = sampler.start // sampler.global_batch_size
        batches = super().__iter__()
        return self._counted(batches)

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._num_given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return where the epoch stands."""
        sampler = self.sampler
        if not isinstance(sampler, ShardedSampler):  # Lightning's own, with overfit_batches
            return {}
        if self._num_given >= len(self):
            return {"epoch": sampler.epoch + 1, "num_images": 0}
        return {
            "epoch": sampler.epoch,
            "num_images": self._num_given * sampler.global_batch_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there at the next iteration."""
        sampler = self.sampler
        if isinstance(sampler, ShardedSampler) and state:
            sampler.set_epoch(state["epoch"])
            batch = sampler.global_batch_size  # of now, which need not be that of the state
            sampler.start = state["num_images"] // batch * batch
