"""Memory that tensors take while a function runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follow the storages that operations make, until they are freed."""

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
    """Return the most bytes that tensors made by ``function`` take at one time while it runs.

    What an operation needs inside itself is not counted.
    """
    with LiveBytes() as mode:
        function()
    return mode.peak


@dataclass(frozen=True)
class Cost:
    """Bytes per image that evaluating takes: feature maps that are held, and what passes make."""

    features: int
    bottom_up: int
    top_down: int

    @property
    def needed(self) -> int:
        """What one image takes."""
        return max(self.bottom_up, self.features + self.top_down)

    def most_images(self, budget: int) -> int:
        """How many images may be looked at together."""
        if budget < self.needed:
            raise ValueError(
                f"memory_budget must be at least {self.needed:,} bytes, which one image takes, "
                f"got {budget:,}"
            )
        return budget // self.needed

    def most_draws(self, budget: int, num_images: int) -> int:
        """How many draws for that many images may be made together."""
        return (budget - self.features * num_images) // self.top_down
