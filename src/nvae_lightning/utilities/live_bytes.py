"""Memory of tensors while a function runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Count the bytes of storages from their allocation until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = _storages((args, kwargs))
        for storage in _storages(result) - given:
            self._add(storage)
        return result

    def _add(self, storage: Any) -> None:  # noqa: ANN401
        if storage not in self._known:
            self._known.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _storages(values: object) -> set[Any]:
    return {leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the peak number of bytes of tensors that ``function`` allocates.

    Scratch memory inside an operation is not counted.
    """
    with LiveBytes() as mode:
        function()
    return mode.peak


def kept_bytes(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> int:
    """Return the bytes of the parameters, the buffers and the optimisers' states."""
    states = tree_leaves([dict(optimizer.state) for optimizer in optimizers])
    kept = chain(module.parameters(), module.buffers(), states)
    return sum(value.nbytes for value in kept if isinstance(value, Tensor))
