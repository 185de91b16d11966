"""The image format, which models and datasets share."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


def require_int(name: str, value: object, minimum: int) -> None:
    """Raise ValueError unless a value is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


@dataclass(frozen=True)
class Image:
    """Format of the images that a dataset provides and a model expects.

    Args:
        channels: 1 (grey) or 3 (colour).
        size: Height and width in pixels.
        bits: Bits per pixel channel, 1 to 8: images have ``2 ** bits`` levels in [0, 1]. With 1
            bit they are binary, sampled with the grey level as the probability of a 1.
        padding: Rows and columns of zeros on each side of the network's input, which its scales
            must divide. The likelihood counts the true pixels only.

    Raises:
        ValueError: If a field is out of range.
    """

    channels: int
    size: int
    bits: int
    padding: int = 0

    def __post_init__(self) -> None:
        require_int("image.size", self.size, 1)
        require_int("image.padding", self.padding, 0)
        require_int("image.bits", self.bits, 1)
        if self.channels not in (1, 3):
            raise ValueError(
                f"image.channels must be 1 (grey) or 3 (colour), got {self.channels!r}"
            )
        if self.bits > 8:
            raise ValueError(
                f"image.bits must be between 1 and 8, got {self.bits}: "
                "images are stored as 8 bits per channel, choose fewer"
            )

    @property
    def padded_size(self) -> int:
        """Height and width of the network's input."""
        return self.size + 2 * self.padding

    @property
    def num_dims(self) -> int:
        """Number of true pixel values, the divisor of bits per dim."""
        return self.channels * self.size**2

    def pad(self, image: Tensor) -> Tensor:
        """Surround the true pixels with zeros, unless the image is already padded."""
        return image if self._is_padded(image) else F.pad(image, (self.padding,) * 4)

    def crop(self, padded: Tensor) -> Tensor:
        """Keep only the true pixels; return images without padding unchanged."""
        if not self._is_padded(padded):
            return padded
        stop = self.padding + self.size
        return padded[..., self.padding : stop, self.padding : stop]

    def _is_padded(self, image: Tensor) -> bool:
        return image.shape[-2:] == (self.padded_size, self.padded_size)
