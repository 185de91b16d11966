# Kernels are Triton's language, not Python: it types their arguments, and only adds tuples.
# ruff: noqa: ANN001, ANN202, RUF005
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
r"""Triton kernels of batch normalisation, swish and the depthwise convolution.

.. math::

    \hat x = (x - \mu) / \sigma, \quad u = \gamma \hat x + \beta, \quad
    a = u \, \mathrm{sigmoid}(u) \text{ with swish, else } u

Feature maps are read as channels_last, copied so if they are not, and come out so. What is read is
computed on and summed in the number format of the statistics, and rounded once. Sums are taken in
an order that depends on the shapes only: equal inputs give equal bits. To a compiler each function
is one operation.

Source: Vahdat & Kautz 2020, Sec. 3.1.1 and 3.1.3, for what is computed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, library

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS and Windows
    _HAS_TRITON = False
else:
    # The first version whose functions take and return tuples of tiles.
    _HAS_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)

FeatureMap = Float[Tensor, "batch channel height width"]
PerChannel = Float[Tensor, " channel"]
DepthwiseKernel = Float[Tensor, "channel 1 kernel_size kernel_size"]

NUM_WARPS = 4
# Fused multiplications and additions are Triton's default up to 3.9, which warns that this ends.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
# A large GPU has some 130 multiprocessors. Three programs each of a kernel that reduces run at the
# same time, with the registers that they take: more would wait for these to end.
MAX_REDUCING_PROGRAMS = 384
# Two each keep it busy; more, of smaller patches, would read and compute more pixels twice.
MIN_PATCH_PROGRAMS = 256


@torch.compiler.assume_constant_result
def is_available(device: torch.device) -> bool:
    """Tell whether the functions here run on a device: a GPU that Triton, if installed, knows."""
    if not _HAS_TRITON or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _jit(function: Callable[..., Any]) -> Any:  # noqa: ANN401
    """Compile when called; a type checker's wrapper around the function is taken off."""
    return triton.jit(inspect.unwrap(function)) if _HAS_TRITON else function


# --------------------------------------------------------------------------------------------
# Parts of kernels. A tile is (pixels or patches, channels).


@_jit
def _locate_channels(CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Which program of how many of its channels this is, the channels, and whether they exist.

    Blocks of channels are innermost: programs that run at the same time read whole pixels.
    """
    blocks: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    program = tl.program_id(0)
    channel = program % blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    return program // blocks, tl.num_programs(0) // blocks, channel, channel < CHANNELS


@_jit
def _locate_pixels(
    tile, num_pixels, channel, is_channel, CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr
):
    """Offsets of a tile's values, and whether they exist."""
    # In 64 bits: a feature map may have more than 2^31 values.
    pixel = tl.cast(tile, tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[:, None]
    return pixel * CHANNELS + channel, (pixel < num_pixels) & is_channel


@_jit
def _locate_patches(
    block, num_patches, height, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_PATCHES: tl.constexpr,
):  # fmt: skip
    """Image, topmost row and leftmost column of each patch, (patch, 1), and whether it exists.

    Neighbours in a row come one after the other, as they share pixels.
    """
    patch = block * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)[:, None]
    patches_across = tl.cdiv(width, COLUMNS)
    patches_down = tl.cdiv(height, ROWS)
    column = patch % patches_across * COLUMNS
    row = patch // patches_across % patches_down * ROWS
    image = patch // (patches_across * patches_down)
    return image.to(tl.int64), row, column, patch < num_patches


@_jit
def _load(pointer, exists, dtype: tl.constexpr):
    return tl.load(pointer, mask=exists, other=0.0).to(dtype)


@_jit
def _load_normalization(means, inverse_stds, weights, biases, channel, is_channel):
    dtype: tl.constexpr = means.dtype.element_ty
    mean = _load(means + channel, is_channel, dtype)
    inverse_std = _load(inverse_stds + channel, is_channel, dtype)
    weight = _load(weights + channel, is_channel, dtype)
    bias = _load(biases + channel, is_channel, dtype)
    return mean, inverse_std, weight, bias


@_jit
def _load_taps(kernel, channel, is_channel, dtype: tl.constexpr, NUM_TAPS: tl.constexpr):
    taps = ()
    for tap in tl.static_range(NUM_TAPS):
        taps = taps + (_load(kernel + channel * NUM_TAPS + tap, is_channel, dtype),)
    return taps


@_jit
def _load_row(
    pointer, offset, is_row, column, width, dtype: tl.constexpr,
    COUNT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Load neighbouring pixels of a row, one tile each; zeros are outside the image."""
    values = ()
    for i in tl.static_range(COUNT):
        inside = is_row & (column + i >= 0) & (column + i < width)
        values = values + (_load(pointer + (offset + i * CHANNELS), inside, dtype),)
    return values


@_jit
def _activate(x, mean, scale, bias, SWISH: tl.constexpr):
    """Normalise and apply swish; `scale` is the weight times the inverse standard deviation."""
    u = (x - mean) * scale + bias
    if SWISH:
        u = u / (1.0 + tl.exp(-u))
    return u


@_jit
def _through_swish(gradient, normalized, weight, bias, SWISH: tl.constexpr):
    """Turn the gradient of a into that of u."""
    if SWISH:
        u = normalized * weight + bias
        sigmoid = 1.0 / (1.0 + tl.exp(-u))
        gradient = gradient * sigmoid * (1.0 + u * (1.0 - sigmoid))
    return gradient


@_jit
def _zeros(shape: tl.constexpr, dtype: tl.constexpr, COUNT: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros(shape, dtype),)
    return tiles


@_jit
def _convolve_row(row, unfinished, taps, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Add what one row of input gives to the SIZE rows of output that it reaches.

    Returns:
        The topmost of them, which is then complete, and the others.
    """
    finished = ()
    others = ()
    for i in tl.static_range(SIZE):
        for j in tl.static_range(COLUMNS):
            total = unfinished[i * COLUMNS + j] if i < SIZE - 1 else 0.0
            for tap in tl.static_range(SIZE):
                total += row[j + tap] * taps[(SIZE - 1 - i) * SIZE + tap]
            if i == 0:
                finished = finished + (total,)
            else:
                others = others + (total,)
    return finished, others


@_jit
def _store_sum(pointer, total, is_channel):
    tl.store(pointer, tl.expand_dims(tl.sum(total, 0), 0), mask=is_channel)


# --------------------------------------------------------------------------------------------
# Kernels


@_jit
def _statistics_kernel(
    x, shifts, partials, num_pixels,
    CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums (part, 2, channel) of what is above a shift and of its square, over some pixels.

    The shift is the mean of the first pixels: of the squares of large numbers nothing would be
    left once the square of their mean is taken off.
    """
    dtype: tl.constexpr = partials.dtype.element_ty
    part, num_parts, channel, is_channel = _locate_channels(CHANNELS, BLOCK_CHANNELS)
    offset, exists = _locate_pixels(0, num_pixels, channel, is_channel, CHANNELS, BLOCK_PIXELS)
    first = tl.sum(_load(x + offset, exists, dtype), 0) / tl.minimum(num_pixels, BLOCK_PIXELS)
    shift = tl.expand_dims(first, 0)
    total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], dtype)
    squares = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], dtype)
    for tile in range(part, tl.cdiv(num_pixels, BLOCK_PIXELS), num_parts):
        offset, exists = _locate_pixels(
            tile, num_pixels, channel, is_channel, CHANNELS, BLOCK_PIXELS
        )
        value = tl.where(exists, _load(x + offset, exists, dtype) - shift, 0.0)
        total += value
        squares += value * value
    place = partials + part * 2 * CHANNELS + channel
    _store_sum(place, total, is_channel)
    _store_sum(place + CHANNELS, squares, is_channel)
    if part == 0:
        tl.store(shifts + channel, shift, mask=is_channel)


@_jit
def _moments_kernel(
    partials, shifts, means, variances, num_parts, num_pixels,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of each channel from what `_statistics_kernel` gives."""
    dtype: tl.constexpr = partials.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < CHANNELS
    total = tl.zeros([BLOCK_CHANNELS], dtype)
    squares = tl.zeros([BLOCK_CHANNELS], dtype)
    for part in range(num_parts):
        place = partials + part * 2 * CHANNELS + channel
        total += _load(place, is_channel, dtype)
        squares += _load(place + CHANNELS, is_channel, dtype)
    mean = total / num_pixels
    variance = tl.maximum(squares / num_pixels - mean * mean, 0.0)
    tl.store(means + channel, _load(shifts + channel, is_channel, dtype) + mean, mask=is_channel)
    tl.store(variances + channel, variance, mask=is_channel)


@_jit
def _normalize_kernel(
    x, means, inverse_stds, weights, biases, output, num_pixels, SWISH: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    tile, _, channel, is_channel = _locate_channels(CHANNELS, BLOCK_CHANNELS)
    mean, inverse_std, weight, bias = _load_normalization(
        means, inverse_stds, weights, biases, channel, is_channel
    )
    offset, exists = _locate_pixels(tile, num_pixels, channel, is_channel, CHANNELS, BLOCK_PIXELS)
    value = _load(x + offset, exists, mean.dtype)
    value = _activate(value, mean, inverse_std * weight, bias, SWISH)
    tl.store(output + offset, value.to(output.dtype.element_ty), mask=exists)


@_jit
def _normalize_sums_kernel(
    gradient, x, means, inverse_stds, weights, biases, partials, num_pixels, SWISH: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums (part, 2, channel) over a part of the pixels."""
    part, num_parts, channel, is_channel = _locate_channels(CHANNELS, BLOCK_CHANNELS)
    mean, inverse_std, weight, bias = _load_normalization(
        means, inverse_stds, weights, biases, channel, is_channel
    )
    sum_du = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], mean.dtype)
    sum_du_xhat = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], mean.dtype)
    for tile in range(part, tl.cdiv(num_pixels, BLOCK_PIXELS), num_parts):
        offset, exists = _locate_pixels(
            tile, num_pixels, channel, is_channel, CHANNELS, BLOCK_PIXELS
        )
        normalized = (_load(x + offset, exists, mean.dtype) - mean) * inverse_std
        du = _load(gradient + offset, exists, mean.dtype)
        du = _through_swish(du, normalized, weight, bias, SWISH)
        sum_du += du
        sum_du_xhat += du * normalized
    place = partials + part * 2 * CHANNELS + channel
    _store_sum(place, sum_du, is_channel)
    _store_sum(place + CHANNELS, sum_du_xhat, is_channel)


@_jit
def _normalize_gradient_kernel(
    gradient, x, means, inverse_stds, weights, biases, mean_du, mean_du_xhat, output, num_pixels,
    SWISH: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    tile, _, channel, is_channel = _locate_channels(CHANNELS, BLOCK_CHANNELS)
    mean, inverse_std, weight, bias = _load_normalization(
        means, inverse_stds, weights, biases, channel, is_channel
    )
    along_one = _load(mean_du + channel, is_channel, mean.dtype)
    along_normalized = _load(mean_du_xhat + channel, is_channel, mean.dtype)
    offset, exists = _locate_pixels(tile, num_pixels, channel, is_channel, CHANNELS, BLOCK_PIXELS)
    normalized = (_load(x + offset, exists, mean.dtype) - mean) * inverse_std
    du = _load(gradient + offset, exists, mean.dtype)
    du = _through_swish(du, normalized, weight, bias, SWISH)
    dx = (du - along_one - normalized * along_normalized) * (weight * inverse_std)
    tl.store(output + offset, dx.to(output.dtype.element_ty), mask=exists)


@_jit
def _depthwise_kernel(
    x, kernel, output, height, width, num_patches,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_PATCHES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Convolve patches of ROWS by COLUMNS pixels of output, going down their rows of input.

    A thread has the same channels of all columns, hence reads a pixel once, not once per tap.
    """
    dtype = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    reach: tl.constexpr = SIZE // 2
    tile, _, channel, is_channel = _locate_channels(CHANNELS, BLOCK_CHANNELS)
    taps = _load_taps(kernel, channel, is_channel, dtype, SIZE * SIZE)
    image, first_row, column, is_patch = _locate_patches(
        tile, num_patches, height, width, ROWS, COLUMNS, BLOCK_PATCHES
    )
    is_patch = is_patch & is_channel
    unfinished = _zeros([BLOCK_PATCHES, BLOCK_CHANNELS], dtype, (SIZE - 1) * COLUMNS)
    for step in range(ROWS + 2 * reach):
        row = first_row + step - reach
        is_row = is_patch & (row >= 0) & (row < height)
        offset = ((image * height + row) * width + column - reach) * CHANNELS + channel
        values = _load_row(
            x, offset, is_row, column - reach, width, dtype, COLUMNS + 2 * reach, CHANNELS
        )
        finished, unfinished = _convolve_row(values, unfinished, taps, SIZE, COLUMNS)
        row = row - reach
        is_row = is_patch & (row >= first_row) & (row < height)
        offset = ((image * height + row) * width + column) * CHANNELS + channel
        for i in tl.static_range(COLUMNS):
            value = finished[i].to(output.dtype.element_ty)
            tl.store(output + (offset + i * CHANNELS), value, mask=is_row & (column + i < width))


# --------------------------------------------------------------------------------------------
# Launches


def _launch(kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:  # noqa: ANN401
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
        kernel[(num_programs,)](*arguments, **constants, **OPTIONS)


def _ceil_div(value: int, by: int) -> int:
    return (value + by - 1) // by


def _channel_block(channels: int, largest: int) -> int:
    """Return a power of 2 that divides the channels, or 32 though it may leave some lanes idle."""
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
    """As _pixel_tiles, with the number of patches first.

    A thread has two neighbouring channels, which one load brings, and the columns of a patch.
    """
    batch, channels, height, width = x.shape
    block = _channel_block(channels, 64)
    patches, num_blocks = NUM_WARPS * 32 * 2 // block, _ceil_div(channels, block)
    rows = min(16, triton.next_power_of_2(height))
    columns = min(4, triton.next_power_of_2(width))
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


@dataclass(frozen=True)
class Normalization:
    r"""How x becomes a.

    Args:
        mean: :math:`\mu`, in float32, or in float64 for a feature map in float64.
        inverse_std: :math:`1 / \sigma`, likewise.
        weight: :math:`\gamma`.
        bias: :math:`\beta`.
        swish: whether to apply swish.
    """

    mean: PerChannel
    inverse_std: PerChannel
    weight: PerChannel
    bias: PerChannel
    swish: bool

    def tensors(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what kernels read, as they do: one value after the other for each channel."""
        tensors = (self.mean, self.inverse_std, self.weight, self.bias)
        assert all(tensor.shape == x.shape[1:2] for tensor in tensors)
        assert self.mean.dtype == torch.promote_types(x.dtype, torch.float32)
        return tuple(tensor.contiguous() for tensor in tensors)


def statistics(x: FeatureMap) -> tuple[PerChannel, PerChannel]:
    """Mean and biased variance of each channel.

    Args:
        x: feature map.

    Returns:
        Both over batch, height and width, in float32, or in float64 for a feature map in float64.
    """
    return _statistics(x)


def normalize(x: FeatureMap, normalization: Normalization) -> FeatureMap:
    """Normalise, and apply swish if asked for.

    Args:
        x: feature map.
        normalization: of it.

    Returns:
        Feature map a, in the number format of `x`.
    """
    return _normalize(x, *normalization.tensors(x), normalization.swish)


def normalize_sums(
    gradient: FeatureMap, x: FeatureMap, normalization: Normalization
) -> Float[Tensor, "2 channel"]:
    r"""Sums that the gradients of a normalisation are made of.

    .. math:: \sum \partial u, \quad \sum \partial u \, \hat x

    which are the gradients of the bias and of the weight.

    Args:
        gradient: of a, in any number format.
        x: feature map.
        normalization: of it.

    Returns:
        Both sums over batch, height and width, in the number format of the mean.
    """
    assert gradient.shape == x.shape
    return _normalize_sums(gradient, x, *normalization.tensors(x), normalization.swish)


def normalize_gradient(
    gradient: FeatureMap,
    x: FeatureMap,
    normalization: Normalization,
    means: Float[Tensor, "2 channel"],
) -> FeatureMap:
    r"""Gradient of a normalisation's input, through the statistics too.

    .. math::

        \partial x = \frac{\gamma}{\sigma} \Bigl(\partial u - \frac{1}{n} \sum \partial u
        - \frac{\hat x}{n} \sum \partial u \, \hat x \Bigr)

    Args:
        gradient: of a, in any number format.
        x: feature map.
        normalization: of it.
        means: the sums of `normalize_sums`, over all ranks, divided by the number n of values
            per channel of all ranks; zeros if the statistics are constants.

    Returns:
        Gradient in the number format of `x`.
    """
    assert gradient.shape == x.shape
    assert means.shape == (2, x.shape[1])
    return _normalize_gradient(gradient, x, *normalization.tensors(x), means, normalization.swish)


def depthwise(x: FeatureMap, kernel: DepthwiseKernel) -> FeatureMap:
    """Convolve each channel with its own kernel.

    Zeros pad x, so that the output is of its size. The gradient of x is the convolution of the
    output's gradient with ``kernel.flip(2, 3)``.

    Args:
        x: feature map.
        kernel: of an odd size.

    Returns:
        Convolution of x, in the number format of `kernel`.
    """
    size = kernel.shape[-1]
    assert kernel.shape == (x.shape[1], 1, size, size)
    assert size % 2 == 1
    return _depthwise(x, kernel)


# --------------------------------------------------------------------------------------------
# Operations, as compilers see them


def _operation(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Let a function be an operation of torch's, so that compilers leave it whole."""

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
    _launch(_statistics_kernel, num_parts * num_blocks, x, shifts, partials, num_pixels, **shape)
    _launch(
        _moments_kernel, num_blocks, partials, shifts, means, variances, num_parts, num_pixels,
        CHANNELS=channels, BLOCK_CHANNELS=shape["BLOCK_CHANNELS"],
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
        _normalize_kernel, num_tiles * num_blocks, x, mean, inverse_std, weight, bias, output,
        x.numel() // x.shape[1], SWISH=swish, **shape,
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
        _normalize_sums_kernel, num_parts * num_blocks, gradient, x, mean, inverse_std, weight,
        bias, partials, x.numel() // x.shape[1], SWISH=swish, **shape,
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
        _normalize_gradient_kernel, num_tiles * num_blocks, gradient, x, mean, inverse_std,
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
        _depthwise_kernel, num_tiles * num_blocks, x, kernel.contiguous(), output, *x.shape[2:],
        num_patches, SIZE=kernel.shape[-1], **shape,
    )  # fmt: skip
    return output


@_depthwise.register_fake
def _(x: Tensor, kernel: Tensor) -> Tensor:
    return _empty(x, kernel.dtype)
