"""Tensors of images as 8-bit pictures."""

from __future__ import annotations

from torch import Tensor
from torchvision.utils import make_grid

_MIN_WIDTH = 480  # pixels of a grid, below which it is enlarged


def as_bytes(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 8 bits."""
    return (255 * images.float().clamp(0.0, 1.0)).round().byte()


def grid(images: Tensor, num_columns: int) -> Tensor:
    """Arrange images row by row as bytes; enlarge small grids by an integer factor."""
    canvas = as_bytes(make_grid(images.float().cpu(), nrow=num_columns, padding=1))
    factor = max(1, -(-_MIN_WIDTH // canvas.shape[-1]))
    return canvas.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
