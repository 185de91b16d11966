"""Checks of a model's input images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nvae_lightning.utilities.image import Image

_TOLERANCE = 0.01  # in units of the distance between levels, beyond the dtype's rounding


def check_shape(x: object, image: Image, name: str = "images") -> Tensor:
    """Check type and shape of images, padded or not, and return them.

    Args:
        x: Batch of images.
        image: Image format of the model.
        name: Subject of the error message.

    Raises:
        ValueError: If the images are not floating-point images of this format.
    """
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{name}: got {type(x).__name__}, but the model expects a tensor of shape (batch, "
            "channel, height, width); use torchvision's ToTensor, or torch.stack"
        )
    sizes = (image.size, image.padded_size)
    is_right = x.ndim == 4 and x.shape[1] == image.channels
    if not (is_right and x.shape[2] == x.shape[3] and x.shape[2] in sizes):
        raise ValueError(
            f"{name}: got a batch of shape {tuple(x.shape)}, but the model is for images of "
            f"(channel, height, width) ({image.channels}, {image.size}, {image.size}); "
            f"{_shape_remedy(x, image)}"
        )
    if not len(x):
        raise ValueError(f"{name}: got an empty batch; give at least one image")
    if not x.is_floating_point():
        remedy = "x.float()" if x.dtype is torch.bool else "x / 255"
        raise ValueError(
            f"{name}: got dtype {x.dtype}, but the model expects floating-point values from 0 to "
            f"1; pass {remedy}"
        )
    return x


def _shape_remedy(x: Tensor, image: Image) -> str:
    shape = tuple(x.shape)
    if x.ndim == 4 and shape[3] == image.channels and shape[1] == shape[2]:
        return "the channels come last: pass x.permute(0, 3, 1, 2)"
    if x.ndim == 3 and shape[1] == shape[2]:
        if shape[0] == image.channels:
            return "pass a batch: x.unsqueeze(0), or set batch_size of the DataLoader"
        if image.channels == 1:
            return "the channel is missing: pass x.unsqueeze(1)"
    return "convert, crop and resize the images, or build a model for them"


def check_values(
    x: Tensor, image: Image, *, on_levels: bool, finite: bool = True, name: str = "images"
) -> None:
    """Check the values of images. Synchronises with their device, so not for CUDA graphs.

    Args:
        x: Batch of images.
        image: Image format of the model.
        on_levels: Whether values must be on the image's levels, not only in [0, 1].
        finite: Whether values must be finite.
        name: Subject of the error message.

    Raises:
        ValueError: If values are not finite, outside [0, 1] or off the levels.
    """
    is_captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or x.is_meta or is_captured:
        return
    top = 2**image.bits - 1
    precise = x.detach()
    if precise.dtype in (torch.float16, torch.bfloat16):
        precise = precise.float()
    levels = top * precise
    found = torch.stack([precise.amin(), precise.amax(), (levels - levels.round()).abs().amax()])
    low, high, off = found.tolist()
    if not all(map(math.isfinite, (low, high))):
        if not finite:
            return
        raise ValueError(
            f"{name}: got values that are not finite (NaN or infinite), but the model expects "
            "values from 0 to 1; check the data and their transforms"
        )
    rounding = top * torch.finfo(x.dtype).eps
    tolerance = _TOLERANCE + rounding
    if low < -tolerance / top or high > 1 + tolerance / top:
        raise ValueError(
            f"{name}: got values from {low:.4g} to {high:.4g}, but the model expects values from "
            f"0 to 1; {_range_remedy(low, high)}"
        )
    if not on_levels or rounding > 0.4 or off <= tolerance:
        return
    if image.bits == 1:
        raise ValueError(
            f"{name}: got values between 0 and 1, but a model of image.bits=1 expects zeros and "
            "ones only; binarise them with torch.bernoulli(x) or x.round()"
        )
    remedy = f"(255 * x).round() / {top}"
    if image.bits < 8:
        remedy = f"((255 * x).round() / {2 ** (8 - image.bits)}).floor() / {top}"
    raise ValueError(
        f"{name}: got values between the {top + 1} levels k / {top} of image.bits={image.bits}, "
        f"but only levels have a probability; quantise the values with {remedy}"
    )


def _range_remedy(low: float, high: float) -> str:
    if low >= 0:
        return "divide them by 255" if 2 < high <= 255 else "scale them or pass x.clamp(0, 1)"
    return "undo transforms.Normalize, for example by (x + 1) / 2"
