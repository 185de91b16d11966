"""How many images and draws of a likelihood estimate fit into memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nvae_lightning.utilities.live_bytes import LiveBytes, peak_bytes

#: Default budgets in bytes. On a CPU, larger ones are not faster.
_CPU_MEMORY_BUDGET = 1 << 28
_GPU_MEMORY_BUDGET = 1 << 32


class Footprint(NamedTuple):
    """Bytes of tensors in the passes of one image.

    Args:
        features: Bottom-up feature maps, which the draws of an image share.
        bottom_up: Peak of the bottom-up pass.
        top_down: Peak of the top-down pass of one draw.
    """

    features: int
    bottom_up: int
    top_down: int

    @classmethod
    def measure(
        cls,
        bottom_up: Callable[[], Sequence[Tensor]],
        top_down: Callable[[Sequence[Tensor]], object],
    ) -> Footprint:
        """Measure the passes of one image, the second given the feature maps of the first."""
        # Not compiled, because code for one image serves no other batch size.
        with torch.compiler.set_stance("force_eager"):
            with LiveBytes() as counter:
                features = bottom_up()
            held = sum(feature.nbytes for feature in features)
            return cls(held, counter.peak, peak_bytes(lambda: top_down(features)))

    def fitting(
        self, memory_budget: int | None, device: torch.device
    ) -> tuple[int, Callable[[int], int]]:
        """Return how many images fit into a budget, and how many draws of each, given the images.

        Args:
            memory_budget: Bytes; None for the device's default, or more if one image needs it.
            device: Device of the images.

        Raises:
            ValueError: If one image does not fit.
        """
        needed = max(self.bottom_up, self.features + self.top_down)
        if memory_budget is None:
            usual = _CPU_MEMORY_BUDGET if device.type == "cpu" else _GPU_MEMORY_BUDGET
            memory_budget = max(usual, needed)
        if memory_budget < needed:
            raise ValueError(
                f"memory_budget must be at least {needed:,} bytes for one image, "
                f"got {memory_budget:,}"
            )
        return (
            memory_budget // needed,
            lambda images: (memory_budget // images - self.features) // self.top_down,
        )
