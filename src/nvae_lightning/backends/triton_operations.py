r"""Batch normalisation, swish and depthwise convolution with Triton kernels.

.. math::

    \hat x = (x - \mu) / \sigma, \quad u = \gamma \hat x + \beta, \quad
    a = u \, \mathrm{sigmoid}(u) \text{ with swish, else } u

Feature maps are returned in channels_last layout, and copied to it if necessary. To a compiler
each function is one opaque operation.

Source: Vahdat & Kautz 2020, Sec. 3.1.1 and 3.1.3, for the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, library

from nvae_lightning.backends import triton_kernels as kernels
from nvae_lightning.model.shapes import FeatureMap, PerChannel

DepthwiseKernel = Float[Tensor, "channel 1 kernel_size kernel_size"]

NUM_WARPS = 4
# Fused multiply-add is Triton's default up to 3.9, which warns that this will change.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
# A large GPU has about 130 multiprocessors, whose registers allow three programs of a reducing
# kernel each at the same time; more would have to wait.
MAX_REDUCING_PROGRAMS = 384
# Two per multiprocessor keep it busy; smaller patches would read and compute more pixels twice.
MIN_PATCH_PROGRAMS = 256


@torch.compiler.assume_constant_result
def is_available(device: torch.device) -> bool:
    """Whether a device supports these functions: a recent GPU, with Triton installed."""
    if not kernels.HAS_TRITON or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


# --------------------------------------------------------------------------------------------
# Launches


def _launch(kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:  # noqa: ANN401
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
        kernel[(num_programs,)](*arguments, **constants, **OPTIONS)


def _ceil_div(value: int, by: int) -> int:
    return (value + by - 1) // by


def _next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _channel_block(channels: int, largest: int) -> int:
    """Return a power of 2 that divides the channels, or 32, which may leave lanes idle."""
    return max(32, math.gcd(channels, largest))


def _num_parts(num_tiles: int, num_blocks: int) -> int:
    return min(num_tiles, _ceil_div(MAX_REDUCING_PROGRAMS, num_blocks))


def _pixel_tiles(x: Tensor, bytes_per_thread: int) -> tuple[int, int, dict[str, int]]:
    """Return the numbers of tiles and of blocks of channels, and their sizes."""
    channels = x.shape[1]
    block = _channel_block(channels, 128)
    pixels = NUM_WARPS * 32 * bytes_per_thread // x.element_size() // block
    shape = {"CHANNELS": channels, "BLOCK_PIXELS": pixels, "BLOCK_CHANNELS": block}
    return _ceil_div(x.numel() // channels, pixels), _ceil_div(channels, block), shape


def _patch_tiles(x: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """Like _pixel_tiles, with the number of patches first.

    A thread computes two neighbouring channels, fetched by one load, and the columns of a patch.
    """
    batch, channels, height, width = x.shape
    block = _channel_block(channels, 64)
    patches, num_blocks = NUM_WARPS * 32 * 2 // block, _ceil_div(channels, block)
    rows = min(16, _next_power_of_2(height))
    columns = min(4, _next_power_of_2(width))
    across = batch * _ceil_div(width, columns)
    while (
        rows > 2 and across * _ceil_div(height, rows) * num_blocks < patches * MIN_PATCH_PROGRAMS
    ):
        rows //= 2
    num_patches = across * _ceil_div(height, rows)
    shape = {
        "ROWS": rows, "COLUMNS": columns, "CHANNELS": channels, "BLOCK_PATCHES": patches,
        "BLOCK_CHANNELS": block,
    }  # fmt: skip
    return num_patches, _ceil_div(num_patches, patches), num_blocks, shape


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)


# --------------------------------------------------------------------------------------------
# Functions


class Normalization(NamedTuple):
    r"""Parameters that turn x into a.

    Args:
        mean: Mean :math:`\mu`, in float32, or in float64 for a feature map in float64.
        inverse_std: Inverse standard deviation :math:`1 / \sigma`, likewise.
        weight: Scale :math:`\gamma`.
        bias: Shift :math:`\beta`.
        swish: Whether swish follows.
    """

    mean: PerChannel
    inverse_std: PerChannel
    weight: PerChannel
    bias: PerChannel
    swish: bool

    def tensors(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the contiguous tensors that kernels read, one value per channel."""
        tensors = (self.mean, self.inverse_std, self.weight, self.bias)
        assert all(tensor.shape == x.shape[1:2] for tensor in tensors)
        assert self.mean.dtype == torch.promote_types(x.dtype, torch.float32)
        return tuple(tensor.contiguous() for tensor in tensors)


def statistics(x: FeatureMap) -> tuple[PerChannel, PerChannel]:
    """Return mean and biased variance of each channel.

    Args:
        x: Feature map.

    Returns:
        Both over batch, height and width, in float32, or in float64 for a feature map in float64.
    """
    return _statistics(x)


def normalize(x: FeatureMap, normalization: Normalization) -> FeatureMap:
    """Normalise and, if ``normalization.swish``, apply swish.

    Args:
        x: Feature map.
        normalization: Its normalisation.

    Returns:
        Feature map a, in the dtype of `x`.
    """
    return _normalize(x, *normalization.tensors(x), normalization.swish)


def normalize_sums(
    gradient: FeatureMap, x: FeatureMap, normalization: Normalization
) -> Float[Tensor, "2 channel"]:
    r"""Return the two sums in the gradients of a normalisation.

    .. math:: \sum \partial u, \quad \sum \partial u \, \hat x

    They are the gradients of bias and weight.

    Args:
        gradient: Gradient of a, in any dtype.
        x: Feature map.
        normalization: Its normalisation.

    Returns:
        Both sums over batch, height and width, in the dtype of the mean.
    """
    assert gradient.shape == x.shape
    return _normalize_sums(gradient, x, *normalization.tensors(x), normalization.swish)


def normalize_gradient(
    gradient: FeatureMap,
    x: FeatureMap,
    normalization: Normalization,
    means: Float[Tensor, "2 channel"],
) -> FeatureMap:
    r"""Return the gradient of a normalisation's input, through the statistics as well.

    .. math::

        \partial x = \frac{\gamma}{\sigma} \Bigl(\partial u - \frac{1}{n} \sum \partial u
        - \frac{\hat x}{n} \sum \partial u \, \hat x \Bigr)

    Args:
        gradient: Gradient of a, in any dtype.
        x: Feature map.
        normalization: Its normalisation.
        means: Sums of `normalize_sums` over all ranks, divided by the number n of values per
            channel of all ranks; zeros if the statistics are constants.

    Returns:
        Gradient in the dtype of `x`.
    """
    assert gradient.shape == x.shape
    assert means.shape == (2, x.shape[1])
    return _normalize_gradient(gradient, x, *normalization.tensors(x), means, normalization.swish)


def depthwise(x: FeatureMap, kernel: DepthwiseKernel) -> FeatureMap:
    """Convolve each channel with its own kernel.

    Zeros pad x, so that the output keeps its size. The gradient of x is the convolution of the
    output's gradient with ``kernel.flip(2, 3)``.

    Args:
        x: Feature map.
        kernel: Kernel of an odd size.

    Returns:
        Convolution of x, in the dtype of `kernel`.
    """
    size = kernel.shape[-1]
    assert kernel.shape == (x.shape[1], 1, size, size)
    assert size % 2 == 1
    return _depthwise(x, kernel)


# --------------------------------------------------------------------------------------------
# Operations, opaque to compilers


def _operation(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as an operation of torch, opaque to compilers."""

    def declare(function: Callable[..., Any]) -> Any:  # noqa: ANN401
        return library.custom_op(
            f"nvae_lightning::triton{function.__name__}", mutates_args=(), schema=schema
        )(function)

    return declare


@_operation("(Tensor x) -> (Tensor, Tensor)")
def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    x = _channels_last(x)
    channels = x.shape[1]
    num_pixels = x.numel() // channels
    num_tiles, num_blocks, shape = _pixel_tiles(x, 32)
    num_parts = _num_parts(num_tiles, num_blocks)
    dtype = torch.promote_types(x.dtype, torch.float32)
    partials = x.new_empty(num_parts, 2, channels, dtype=dtype)
    shifts, means, variances = (x.new_empty(channels, dtype=dtype) for _ in range(3))
    _launch(
        kernels.statistics_kernel, num_parts * num_blocks, x, shifts, partials, num_pixels, **shape
    )
    _launch(
        kernels.moments_kernel, num_blocks, partials, shifts, means, variances, num_parts,
        num_pixels, CHANNELS=channels, BLOCK_CHANNELS=shape["BLOCK_CHANNELS"],
    )  # fmt: skip
    return means, variances


@_statistics.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


@_operation(
    "(Tensor x, Tensor mean, Tensor inverse_std, Tensor weight, Tensor bias, bool swish) -> Tensor"
)
def _normalize(
    x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor, swish: bool
) -> Tensor:
    x = _channels_last(x)
    num_tiles, num_blocks, shape = _pixel_tiles(x, 64)
    output = _empty(x, x.dtype)
    _launch(
        kernels.normalize_kernel, num_tiles * num_blocks, x, mean, inverse_std, weight, bias,
        output, x.numel() // x.shape[1], SWISH=swish, **shape,
    )  # fmt: skip
    return output


@_normalize.register_fake
def _(
    x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor, swish: bool
) -> Tensor:
    return _empty(x, x.dtype)


@_operation(
    "(Tensor gradient, Tensor x, Tensor mean, Tensor inverse_std, Tensor weight, Tensor bias, "
    "bool swish) -> Tensor"
)
def _normalize_sums(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor,
    swish: bool,
) -> Tensor:  # fmt: skip
    x, gradient = _channels_last(x), _channels_last(gradient)
    num_tiles, num_blocks, shape = _pixel_tiles(x, 32)
    num_parts = _num_parts(num_tiles, num_blocks)
    partials = mean.new_empty(num_parts, 2, x.shape[1])
    _launch(
        kernels.normalize_sums_kernel, num_parts * num_blocks, gradient, x, mean, inverse_std,
        weight, bias, partials, x.numel() // x.shape[1], SWISH=swish, **shape,
    )  # fmt: skip
    return partials.sum(0)


@_normalize_sums.register_fake
def _(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor,
    swish: bool,
) -> Tensor:  # fmt: skip
    return mean.new_empty(2, x.shape[1])


@_operation(
    "(Tensor gradient, Tensor x, Tensor mean, Tensor inverse_std, Tensor weight, Tensor bias, "
    "Tensor means, bool swish) -> Tensor"
)
def _normalize_gradient(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor,
    means: Tensor, swish: bool,
) -> Tensor:  # fmt: skip
    x, gradient = _channels_last(x), _channels_last(gradient)
    num_tiles, num_blocks, shape = _pixel_tiles(x, 64)
    output = _empty(x, x.dtype)
    _launch(
        kernels.normalize_gradient_kernel, num_tiles * num_blocks, gradient, x, mean, inverse_std,
        weight, bias, *means.contiguous(), output, x.numel() // x.shape[1], SWISH=swish, **shape,
    )  # fmt: skip
    return output


@_normalize_gradient.register_fake
def _(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor,
    means: Tensor, swish: bool,
) -> Tensor:  # fmt: skip
    return _empty(x, x.dtype)


@_operation("(Tensor x, Tensor kernel) -> Tensor")
def _depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    x = _channels_last(x)
    num_patches, num_tiles, num_blocks, shape = _patch_tiles(x)
    output = _empty(x, kernel.dtype)
    _launch(
        kernels.depthwise_kernel, num_tiles * num_blocks, x, kernel.contiguous(), output,
        *x.shape[2:], num_patches, SIZE=kernel.shape[-1], **shape,
    )  # fmt: skip
    return output


@_depthwise.register_fake
def _(x: Tensor, kernel: Tensor) -> Tensor:
    return _empty(x, kernel.dtype)
