"""The choice of the images of a split that are pictured."""

import math

import pytest
import torch

from nvae_lightning.training.callbacks import Pictures


@pytest.mark.parametrize(
    ("num_batches", "batch_size"), [(1, 100), (3, 40), (32, 32), (40, 25), (1000, 4)]
)
def test_pictured_images_are_spread_over_a_split_sorted_by_class(
    num_batches: int, batch_size: int
) -> None:
    pictures = Pictures(num_images=40)
    positions = torch.arange(num_batches * batch_size).float().view(num_batches, batch_size)
    for index, batch in enumerate(positions):
        pictures._keep(batch, index, num_batches)
    kept = torch.stack(pictures._images)
    classes = (
        10 * kept / positions.numel()
    ).long()  # ten classes of equal size, one after another
    assert len(kept) == 20
    assert classes.unique().tolist() == list(range(10))


def test_the_first_images_of_a_split_without_a_length_are_pictured() -> None:
    pictures = Pictures(num_images=6)
    for index in range(4):
        pictures._keep(torch.full((2,), float(index)), index, math.inf)
    assert torch.stack(pictures._images).tolist() == [0.0, 0.0, 1.0]
