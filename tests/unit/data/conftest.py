"""Fixtures that read the images of a source in this process or in forked workers."""

from collections.abc import Callable

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from nvae_lightning.data.readers import Source, Wanted

Read = Callable[[Source], list[np.ndarray]]


class _Images(Dataset[np.ndarray]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: int) -> np.ndarray:
        with self.source.image(index) as image:
            return np.asarray(image)


@pytest.fixture
def wanted() -> Wanted:
    """Settings for images of 8x8 pixels, a quarter of them held out."""
    return Wanted(image_size=8, test_fraction=0.25, split_seed=0)


@pytest.fixture
def read() -> Read:
    """Reader of all images of a source, decoded by Pillow only."""

    def here(source: Source) -> list[np.ndarray]:
        return [_Images(source)[index] for index in range(len(source))]

    return here


@pytest.fixture
def read_in_workers(read: Read) -> Read:
    """Reader in two forked processes, four times, after this process has opened the files."""

    def there(source: Source) -> list[np.ndarray]:
        read(source)
        loader = DataLoader(
            _Images(source),
            batch_size=None,
            sampler=4 * [*range(len(source))],  # so that both surely read concurrently
            num_workers=2,
            multiprocessing_context="fork",
            collate_fn=lambda image: image,
        )
        return list(loader)

    return there
