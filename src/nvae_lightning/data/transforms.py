"""Transforms from stored uint8 images to the model's float32 images.

They work on whole batches on the batch's device, so that only one byte per value is transferred to
an accelerator.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def quantize(
    images: UInt8[Tensor, "batch channel height width"], bits: int
) -> Float[Tensor, "batch channel height width"]:
    """Keep the most significant bits of each value and scale the levels to [0, 1].

        x = floor(x₈ / 2^(8 − bits)) / (2^bits − 1)

    Source: Vahdat & Kautz 2020, Sec. 4 (256×256 images with 5 bits); Glow, Kingma & Dhariwal 2018.

    Args:
        images: Images with 8 bits per channel.
        bits: Number of bits to keep, 1 to 8.

    Returns:
        float32 images with 2^bits equidistant levels from 0 to 1.
    """
    return (images >> (8 - bits)).float() / (2**bits - 1)


def binarize(
    images: UInt8[Tensor, "batch channel height width"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch channel height width"]:
    """Draw each pixel from a Bernoulli distribution whose mean is the pixel's intensity.

        x ~ Bernoulli(x₈ / 255), drawn again at every call (dynamic binarisation)

    Source: Vahdat & Kautz 2020, Sec. 4.1 (dynamically binarized MNIST).

    Args:
        images: Images with 8 bits per channel.
        generator: Source of the random numbers; None for PyTorch's own.

    Returns:
        float32 images of zeros and ones.
    """
    return torch.bernoulli(images.float() / 255, generator=generator)


def random_horizontal_flip(
    images: UInt8[Tensor, "batch channel height width"],
) -> UInt8[Tensor, "batch channel height width"]:
    """Mirror each image left to right with probability 1/2, independently of the others."""
    # A mask, because an index would synchronise the host with the device.
    flipped = torch.rand(images.shape[0], 1, 1, 1, device=images.device) < 0.5
    return torch.where(flipped, images.flip(-1), images)
