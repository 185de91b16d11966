"""A SLURM cluster of two nodes, and two hosts on a network of their own, on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor

from .slurm import Slurm, cluster, missing_requirement
from .training import final_weights, train_on_one_rank


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Final weights of one rank with the whole batch."""
    run = tmp_path_factory.mktemp("one") / "run"
    train_on_one_rank(run)
    return final_weights(run)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A SLURM cluster of two nodes."""
    if reason := missing_requirement():
        pytest.skip(reason)
    with cluster() as running:
        yield running
