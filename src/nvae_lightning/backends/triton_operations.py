r"""Batch normalisation, swish and depthwise convolution with Triton kernels.

.. math::

    \hat x = (x - \mu) / \sigma, \quad u = \gamma \hat x + \beta, \quad
    a = u \, \mathrm{sigmoid}(u) \text{ with swish, else } u

Feature maps are returned in channels_last layout, and copied to it if necessary.

Source: Vahdat & Kautz 2020, Sec. 3.1.1 and 3.1.3, for the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, library

from nvae_lightning.backends import triton_kernels as kernels
from nvae_lightning.backends.kernels import Normalization, Share, TorchKernels
from nvae_lightning.model.shapes import FeatureMap, PerChannel

NUM_WARPS = 4
# Fused multiply-add is Triton's default up to 3.9, which warns that this will change.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
# A large GPU has about 130 multiprocessors, whose registers allow three programs of a reducing
# kernel each at the same time; more would have to wait.
MAX_REDUCING_PROGRAMS = 384
# Two per multiprocessor keep it busy; smaller patches would read and compute more pixels twice.
MIN_PATCH_PROGRAMS = 256


class TritonKernels(TorchKernels):
    """Triton kernels, for GPUs."""

    def statistics(self, x: FeatureMap) -> tuple[PerChannel, PerChannel]:
        """Return mean and biased variance of each channel."""
        return _statistics(x)

    def normalize(self, x: FeatureMap, normalization: Normalization) -> FeatureMap:
        """Compute a."""
        *affine, swish = normalization
        return _normalize(x, affine, swish)

    def normalize_gradients(
        self, gradient: FeatureMap, x: FeatureMap, normalization: Normalization, share: Share
    ) -> tuple[FeatureMap, PerChannel, PerChannel]:
        """See :meth:`TorchKernels.normalize_gradients`."""
        *affine, swish = normalization
        sums = _normalize_sums(gradient, x, affine, swish)
        grad_x = _normalize_gradient(gradient, x, affine, share(sums), swish)
        grad_bias, grad_weight = sums
        return grad_x, grad_weight, grad_bias

    @staticmethod
    def depthwise(x: FeatureMap, kernel: Tensor) -> FeatureMap:
        """Convolve each channel with its own kernel of an odd size, padded with zeros."""
        return _depthwise(x, kernel)


@cache
def is_available(device: torch.device) -> bool:
    """Whether a device supports the kernels: a recent GPU, with Triton installed."""
    if not kernels.HAS_TRITON or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


# --------------------------------------------------------------------------------------------
# Launches


def _launch(kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:  # noqa: ANN401
    if not is_available(device := arguments[0].device):
        raise ValueError(
            "compute.kernels: got triton, which requires the package triton and a GPU of compute "
            f"capability 8.0 or more, but the device is '{device}'; set compute.kernels=auto"
        )
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


def _contiguous(affine: Sequence[Tensor]) -> Iterator[Tensor]:
    return (tensor.contiguous() for tensor in affine)


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)


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


@_operation("(Tensor x, Tensor[] affine, bool swish) -> Tensor")
def _normalize(x: Tensor, affine: Sequence[Tensor], swish: bool) -> Tensor:
    x = _channels_last(x)
    num_tiles, num_blocks, shape = _pixel_tiles(x, 64)
    output = _empty(x, x.dtype)
    _launch(
        kernels.normalize_kernel, num_tiles * num_blocks, x, *_contiguous(affine), output,
        x.numel() // x.shape[1], SWISH=swish, **shape,
    )  # fmt: skip
    return output


@_normalize.register_fake
def _(x: Tensor, affine: Sequence[Tensor], swish: bool) -> Tensor:
    return _empty(x, x.dtype)


@_operation("(Tensor gradient, Tensor x, Tensor[] affine, bool swish) -> Tensor")
def _normalize_sums(gradient: Tensor, x: Tensor, affine: Sequence[Tensor], swish: bool) -> Tensor:
    """Return the sums of the gradient of u and of its product with the normalised x."""
    x, gradient = _channels_last(x), _channels_last(gradient)
    num_tiles, num_blocks, shape = _pixel_tiles(x, 32)
    num_parts = _num_parts(num_tiles, num_blocks)
    partials = affine[0].new_empty(num_parts, 2, x.shape[1])
    _launch(
        kernels.normalize_sums_kernel, num_parts * num_blocks, gradient, x,
        *_contiguous(affine), partials, x.numel() // x.shape[1], SWISH=swish, **shape,
    )  # fmt: skip
    return partials.sum(0)


@_normalize_sums.register_fake
def _(gradient: Tensor, x: Tensor, affine: Sequence[Tensor], swish: bool) -> Tensor:
    return affine[0].new_empty(2, x.shape[1])


@_operation("(Tensor gradient, Tensor x, Tensor[] affine, Tensor means, bool swish) -> Tensor")
def _normalize_gradient(
    gradient: Tensor, x: Tensor, affine: Sequence[Tensor], means: Tensor, swish: bool
) -> Tensor:
    x, gradient = _channels_last(x), _channels_last(gradient)
    num_tiles, num_blocks, shape = _pixel_tiles(x, 64)
    output = _empty(x, x.dtype)
    _launch(
        kernels.normalize_gradient_kernel, num_tiles * num_blocks, gradient, x,
        *_contiguous(affine), *means.contiguous(), output, x.numel() // x.shape[1],
        SWISH=swish, **shape,
    )  # fmt: skip
    return output


@_normalize_gradient.register_fake
def _(gradient: Tensor, x: Tensor, affine: Sequence[Tensor], means: Tensor, swish: bool) -> Tensor:
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
