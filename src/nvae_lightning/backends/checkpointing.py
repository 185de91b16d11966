"""Cells of which only the input is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from nvae_lightning.model.cells import ResidualCell
from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.model.shapes import FeatureMap


class CheckpointedCell(ResidualCell):
    """Cell that the backward pass recomputes from its input; mixed into each class of cells.

    Attributes:
        plain: Class of the cell without checkpointing.
        min_size: Width of the input from which on the cell is recomputed.
    """

    plain: type[ResidualCell]
    min_size: int

    def forward(self, x: FeatureMap) -> FeatureMap:
        if x.shape[-1] < self.min_size or not torch.is_grad_enabled():
            return super().forward(x)
        return checkpoint(
            super().forward,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is drawn in a cell
            context_fn=lambda: (nullcontext(), self._repeated()),
        )

    @contextmanager
    def _repeated(self) -> Iterator[None]:
        """Keep the recomputation from moving running statistics again."""
        norms = [module for module in self.modules() if isinstance(module, BatchNorm)]
        for norm in norms:
            norm.is_repeated = True
        try:
            yield
        finally:
            for norm in norms:
                norm.is_repeated = False

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401
        # The class has been made at run time: pickles name the class that it was made from.
        return _new, (self.plain,), self.__getstate__()


@cache
def checkpointed(plain: type[ResidualCell]) -> type[CheckpointedCell]:
    """Return the checkpointed variant of a class of cells."""
    bases = (CheckpointedCell, plain)
    return type(f"Checkpointed{plain.__name__}", bases, {"plain": plain})


def _new(plain: type[ResidualCell]) -> CheckpointedCell:
    kind = checkpointed(plain)
    return kind.__new__(kind)
