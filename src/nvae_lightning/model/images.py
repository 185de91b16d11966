"""Checks of the images that a model is given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nvae_lightning.model.hierarchy import Image

_TOLERANCE = 0.01  # of a step between two levels, beside what the dtype rounds


def check_shape(x: object, image: Image, name: str = "images") -> Tensor:
    """Return images, padded or not, whose type and shape are right; their values are not read.

    Args:
        x: Batch of images.
        image: What the model is for.
        name: Subject of the message.

    Raises:
        ValueError: If they are not floating-point images of the model's channels and size.
    """
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{name}: got {type(x).__name__}, but the model takes a tensor of shape (batch, "
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
        remedy = "x / 255, as torchvision's ToTensor does"
        if x.dtype is torch.bool:
            remedy = "x.float()"
        raise ValueError(
            f"{name}: got dtype {x.dtype}, but the model takes floating-point values from 0 to 1; "
            f"give {remedy}"
        )
    return x


def check_dtype(x: Tensor, dtype: torch.dtype) -> None:
    """Check that images can be computed with, in what a model's weights are.

    Raises:
        ValueError: If they are of another dtype, which autocast does not take care of.
    """
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"images: got {x.dtype}, but the model computes in {dtype}; give x.to({dtype})"
        )


def _shape_remedy(x: Tensor, image: Image) -> str:
    shape = tuple(x.shape)
    if x.ndim == 4 and shape[3] == image.channels and shape[1] == shape[2]:
        return "the channels come last: give x.permute(0, 3, 1, 2)"
    if x.ndim == 3 and shape[1] == shape[2]:
        if shape[0] == image.channels:
            return "give a batch, x.unsqueeze(0), or with batch_size set in the DataLoader"
        if image.channels == 1:
            return "the channel is missing: give x.unsqueeze(1)"
    if x.ndim == 4 and shape[1] in (1, 3) and shape[1] != image.channels:
        kind = (
            "grey (torchvision's Grayscale)" if image.channels == 1 else "colour (three channels)"
        )
        return f"convert the images to {kind}, or build a model for channels={shape[1]}"
    if x.ndim == 4 and shape[1] == image.channels and shape[2] == shape[3]:
        return f"resize the images, or build a model for size={shape[2]}"
    return "batch, crop and resize the images accordingly"


def check_values(
    x: Tensor, image: Image, *, on_levels: bool, finite: bool = True, name: str = "images"
) -> None:
    """Check the values of images, which waits for their device; in graphs nothing is checked.

    Args:
        x: Batch of images.
        image: What the model is for.
        on_levels: Whether they must be on the image's levels, not only from 0 to 1.
        finite: Whether they must be finite; if not, images that are not pass.
        name: Subject of the message.

    Raises:
        ValueError: If values are not finite, not from 0 to 1, or off the levels.
    """
    if torch.compiler.is_compiling() or x.is_meta or _is_capturing(x):
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
            f"{name}: got values that are not finite (NaN or infinite), but the model takes "
            "values from 0 to 1; look for such values in the data and in their transforms"
        )
    rounding = top * torch.finfo(x.dtype).eps
    tolerance = _TOLERANCE + rounding
    if low < -tolerance / top or high > 1 + tolerance / top:
        raise ValueError(
            f"{name}: got values from {low:.4g} to {high:.4g}, but the model takes values from 0 "
            f"to 1; {_range_remedy(low, high)}"
        )
    if not on_levels or rounding > 0.4 or off <= tolerance:
        return
    if image.bits == 1:
        raise ValueError(
            f"{name}: got values between 0 and 1, but a model of image.bits=1 takes zeros and "
            "ones only; binarise them by torch.bernoulli(x), or by x.round()"
        )
    remedy = f"(255 * x).round() / {top}"
    if image.bits < 8:
        remedy = f"((255 * x).round() / {2 ** (8 - image.bits)}).floor() / {top}"
    raise ValueError(
        f"{name}: got values off the {top + 1} levels k / {top} of image.bits={image.bits}, to "
        f"which the likelihood gives probabilities; quantise them by {remedy}"
    )


def _range_remedy(low: float, high: float) -> str:
    if low >= 0 and 2 < high <= 255:
        return "divide them by 255"
    if low >= 0 and high <= 2:
        return "clamp them, x.clamp(0, 1), or scale them"
    if low >= -1 and high <= 1:
        return "map them by (x + 1) / 2, or leave out transforms.Normalize"
    return "scale them, or leave out transforms.Normalize"


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
