"""Loaders of one split for one of several ranks."""

from typing import Any

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
    trainer: Any,  # noqa: ANN401 -- a Trainer or None
) -> DataLoader[UInt8[Tensor, "channel height width"]]:
    """Return a loader of full, shuffled batches to train with, or of all images in order.

    Args:
        dataset: Images of the split.
        train: Whether to train with them.
        batch_size: Number of images per batch and rank.
        seed: Seed of the order.
        num_workers: Number of processes that assemble batches; 0 stands for a thread.
        trainer: Trainer that knows the ranks and the limit of batches; None for one rank.

    Raises:
        ValueError: If there are too few images.
    """
    num_ranks = 1 if trainer is None else trainer.world_size
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
    sampler = ShardedSampler(
        len(dataset),
        batch_size=batch_size,
        train=train,
        seed=seed,
        rank=0 if trainer is None else trainer.global_rank,
        num_ranks=num_ranks,
    )
    loader = (ResumableLoader if train else ReadingAhead)(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=train,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=already_a_batch,
        generator=torch.Generator(),  # leaves the global random numbers to a resume
    )
    if isinstance(loader, ResumableLoader) and trainer is not None:
        limit = trainer.limit_train_batches
        loader.limit = limit if isinstance(limit, int) else int(limit * len(loader))
    return loader
