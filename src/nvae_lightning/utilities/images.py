"""Tensors of images as 8-bit pictures."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from nvae_lightning.utilities.files import whole_file

_MIN_WIDTH = 480  # pixels of a grid, below which it is enlarged


def as_bytes(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 8 bits."""
    return (255 * images.float().clamp(0.0, 1.0)).round().byte()


def as_pixels(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 8 bits (batch, height, width, channel), in main memory."""
    return as_bytes(images).permute(0, 2, 3, 1).cpu()


def enlarge(pixels: Tensor, min_width: int) -> Tensor:
    """Enlarge pixels by the smallest integer factor that gives at least a width."""
    factor = max(1, -(-min_width // pixels.shape[-1]))
    return pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def grid(images: Tensor, num_columns: int) -> Tensor:
    """Arrange images row by row as bytes; enlarge small grids by an integer factor."""
    canvas = as_bytes(make_grid(images.float().cpu(), nrow=num_columns, padding=1))
    return enlarge(canvas, _MIN_WIDTH)


def write_grid(images: Tensor, num_columns: int, path: Path) -> None:
    """Write images row by row as a picture file.

    Raises:
        OSError: If the file is not writable.
    """
    with whole_file(path) as partial:
        to_pil_image(grid(images, num_columns)).save(partial)
