"""Loaders of one split, for one of several ranks."""

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from nvae_lightning.data.dataset import ImageDataset, already_a_batch
from nvae_lightning.data.sampler import ReadingAhead, ResumableLoader, ShardedSampler


def make_loader(
    dataset: ImageDataset,
    *,
    train: bool,
    batch_size: int,
    seed: int,
    num_workers: int,
    rank: int,
    num_ranks: int,
) -> DataLoader[UInt8[Tensor, "channel height width"]]:
    """Return a loader of full, shuffled batches to train with, or of all images in their order.

    Args:
        dataset: The split.
        train: Whether it is trained with.
        batch_size: Images per batch and per rank.
        seed: Seed of the order.
        num_workers: Processes that assemble batches; 0 leaves it to a thread.
        rank: Number of this rank.
        num_ranks: Number of ranks.

    Raises:
        ValueError: If there are too few images.
    """
    if train and len(dataset) < batch_size * num_ranks:
        raise ValueError(
            f"dataset.batch_size: got {batch_size} on each of {num_ranks} devices, but there are "
            f"only {len(dataset)} images and training takes full batches; set "
            f"dataset.batch_size={len(dataset) // num_ranks} or less"
        )
    if len(dataset) < num_ranks:
        raise ValueError(
            f"trainer.devices: got {num_ranks}, but there are only {len(dataset)} images to "
            f"evaluate; set trainer.devices={len(dataset)} or less"
        )
    loader_class = ResumableLoader if train else ReadingAhead
    return loader_class(
        dataset,
        batch_size=batch_size,
        sampler=ShardedSampler(
            len(dataset),
            batch_size=batch_size,
            train=train,
            seed=seed,
            rank=rank,
            num_ranks=num_ranks,
        ),
        drop_last=train,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=already_a_batch,
        generator=torch.Generator(),  # leaves alone the random numbers that a resume restores
    )
