# Kernels are Triton's language, not Python: it types their arguments, and only adds tuples.
# ruff: noqa: ANN001, ANN202, RUF005
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
r"""Triton kernels of batch normalisation, swish and the depthwise convolution after them.

.. math::

    \hat x = (x - \mu) / \sigma, \quad u = \gamma \hat x + \beta, \quad
    a = u \, \mathrm{sigmoid}(u) \text{ with swish, else } u

Feature maps are read as channels_last, copied so if they are not, and come out so. What is read is
computed on and summed in the number format of the statistics, and rounded once. Sums are taken in
an order that depends on the shapes only: equal inputs give equal bits. Mean and variance are left
to torch.

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
from torch import Tensor

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
def _activate_row(
    values, is_row, column, width, mean, scale, bias, SWISH: tl.constexpr, COUNT: tl.constexpr
):
    """Normalise what _load_row gives, and apply swish; zeros stay outside the image."""
    activations = ()
    for i in tl.static_range(COUNT):
        inside = is_row & (column + i >= 0) & (column + i < width)
        value = _activate(values[i], mean, scale, bias, SWISH)
        activations = activations + (tl.where(inside, value, 0.0),)
    return activations


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
    x, means, inverse_stds, weights, biases, kernel, output, height, width, num_patches,
    SWISH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_PATCHES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Convolve patches of ROWS by COLUMNS pixels of output, going down their rows of input.

    A thread has the same channels of all columns, hence activates a pixel once, not once per tap.
    """
    dtype = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    reach: tl.constexpr = SIZE // 2
    tile, _, channel, is_channel = _locate_channels(CHANNELS, BLOCK_CHANNELS)
    if means is not None:
        mean, inverse_std, weight, bias = _load_normalization(
            means, inverse_stds, weights, biases, channel, is_channel
        )
        scale = inverse_std * weight
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
        if means is not None:
            values = _activate_row(
                values, is_row, column - reach, width, mean, scale, bias, SWISH,
                COLUMNS + 2 * reach,
            )  # fmt: skip
        finished, unfinished = _convolve_row(values, unfinished, taps, SIZE, COLUMNS)
        row = row - reach
        is_row = is_patch & (row >= first_row) & (row < height)
        offset = ((image * height + row) * width + column) * CHANNELS + channel
        for i in tl.static_range(COLUMNS):
            value = finished[i].to(output.dtype.element_ty)
            tl.store(output + (offset + i * CHANNELS), value, mask=is_row & (column + i < width))


@_jit
def _depthwise_kernel_gradient_kernel(
    gradient, x, means, inverse_stds, weights, biases, partials, height, width, num_patches,
    SWISH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_PATCHES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums (part, tap, channel) over patches of input, going down the rows of the gradient.

    As many rows of activations as the kernel has are held, each activated once; of the gradient
    also the pixels around the patch are read.
    """
    reach: tl.constexpr = SIZE // 2
    part, num_parts, channel, is_channel = _locate_channels(CHANNELS, BLOCK_CHANNELS)
    mean, inverse_std, weight, bias = _load_normalization(
        means, inverse_stds, weights, biases, channel, is_channel
    )
    sums = _zeros([BLOCK_PATCHES, BLOCK_CHANNELS], mean.dtype, SIZE * SIZE)
    for block in range(part, tl.cdiv(num_patches, BLOCK_PATCHES), num_parts):
        image, first_row, column, is_patch = _locate_patches(
            block, num_patches, height, width, ROWS, COLUMNS, BLOCK_PATCHES
        )
        is_patch = is_patch & is_channel
        held = _zeros([BLOCK_PATCHES, BLOCK_CHANNELS], mean.dtype, (SIZE - 1) * COLUMNS)
        for step in range(ROWS + 2 * reach):
            row = first_row + step
            is_row = is_patch & (row < height) & (step < ROWS)
            offset = ((image * height + row) * width + column) * CHANNELS + channel
            values = _load_row(x, offset, is_row, column, width, mean.dtype, COLUMNS, CHANNELS)
            held = held + _activate_row(
                values, is_row, column, width, mean, inverse_std * weight, bias, SWISH, COLUMNS
            )
            row = row - reach
            is_row = is_patch & (row >= 0) & (row < height)
            offset = ((image * height + row) * width + column - reach) * CHANNELS + channel
            values = _load_row(
                gradient, offset, is_row, column - reach, width, mean.dtype, COLUMNS + 2 * reach,
                CHANNELS,
            )  # fmt: skip
            next_sums = ()
            for i in tl.static_range(SIZE):
                for j in tl.static_range(SIZE):
                    total = sums[i * SIZE + j]
                    for k in tl.static_range(COLUMNS):
                        total += held[i * COLUMNS + k] * values[k + 2 * reach - j]
                    next_sums = next_sums + (total,)
            sums = next_sums
            next_held = ()
            for i in tl.static_range((SIZE - 1) * COLUMNS):
                next_held = next_held + (held[COLUMNS + i],)
            held = next_held
    for tap in tl.static_range(SIZE * SIZE):
        place = partials + (part * (SIZE * SIZE) + tap) * CHANNELS + channel
        _store_sum(place, sums[tap], is_channel)


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


def normalize(x: FeatureMap, normalization: Normalization) -> FeatureMap:
    """Normalise, and apply swish if asked for.

    Args:
        x: feature map.
        normalization: of it.

    Returns:
        Feature map a, in the number format of `x`.
    """
    x = _channels_last(x)
    num_tiles, num_blocks, shape = _pixel_tiles(x, 64)
    output = _empty(x, x.dtype)
    _launch(
        _normalize_kernel, num_tiles * num_blocks, x, *normalization.tensors(x), output,
        x.numel() // x.shape[1], SWISH=normalization.swish, **shape,
    )  # fmt: skip
    return output


def normalize_sums(
    gradient: FeatureMap, x: FeatureMap, normalization: Normalization
) -> tuple[PerChannel, PerChannel]:
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
    x, gradient = _channels_last(x), _channels_last(gradient)
    num_tiles, num_blocks, shape = _pixel_tiles(x, 32)
    num_parts = _num_parts(num_tiles, num_blocks)
    partials = normalization.mean.new_empty(num_parts, 2, x.shape[1])
    _launch(
        _normalize_sums_kernel, num_parts * num_blocks, gradient, x, *normalization.tensors(x),
        partials, x.numel() // x.shape[1], SWISH=normalization.swish, **shape,
    )  # fmt: skip
    sum_du, sum_du_xhat = partials.sum(0)
    return sum_du, sum_du_xhat


def normalize_gradient(
    gradient: FeatureMap,
    x: FeatureMap,
    normalization: Normalization,
    mean_du: PerChannel,
    mean_du_xhat: PerChannel,
) -> FeatureMap:
    r"""Gradient of a normalisation's input, through the statistics too.

    .. math::

        \partial x = \frac{\gamma}{\sigma} \Bigl(\partial u - \frac{1}{n} \sum \partial u
        - \frac{\hat x}{n} \sum \partial u \, \hat x \Bigr)

    Args:
        gradient: of a, in any number format.
        x: feature map.
        normalization: of it.
        mean_du: first sum of `normalize_sums`, over all ranks, divided by the number n of values
            per channel of all ranks; zeros if the statistics are constants.
        mean_du_xhat: second sum, likewise.

    Returns:
        Gradient in the number format of `x`.
    """
    assert gradient.shape == x.shape
    assert mean_du.shape == mean_du_xhat.shape == x.shape[1:2]
    x, gradient = _channels_last(x), _channels_last(gradient)
    num_tiles, num_blocks, shape = _pixel_tiles(x, 64)
    output = _empty(x, x.dtype)
    _launch(
        _normalize_gradient_kernel, num_tiles * num_blocks, gradient, x,
        *normalization.tensors(x), mean_du.contiguous(), mean_du_xhat.contiguous(), output,
        x.numel() // x.shape[1], SWISH=normalization.swish, **shape,
    )  # fmt: skip
    return output


def depthwise(
    x: FeatureMap, normalization: Normalization | None, kernel: DepthwiseKernel
) -> FeatureMap:
    """Normalise, apply swish if asked for, and convolve each channel; only the result is written.

    Zeros pad a, so that the output is of the input's size. The gradient of a is the convolution of
    the output's gradient with ``kernel.flip(2, 3)``.

    Args:
        x: feature map.
        normalization: of it; without, a is x.
        kernel: of an odd size.

    Returns:
        Convolution of a, in the number format of `kernel`.
    """
    size = kernel.shape[-1]
    assert kernel.shape == (x.shape[1], 1, size, size)
    assert size % 2 == 1
    x = _channels_last(x)
    num_patches, num_tiles, num_blocks, shape = _patch_tiles(x)
    output = _empty(x, kernel.dtype)
    _launch(
        _depthwise_kernel, num_tiles * num_blocks, x,
        *((None,) * 4 if normalization is None else normalization.tensors(x)),
        kernel.contiguous(), output, *x.shape[2:], num_patches,
        SWISH=normalization is not None and normalization.swish, SIZE=size, **shape,
    )  # fmt: skip
    return output


def depthwise_kernel_gradient(
    gradient: FeatureMap, x: FeatureMap, normalization: Normalization, kernel_size: int
) -> DepthwiseKernel:
    """Gradient of `depthwise`'s kernel.

    Args:
        gradient: of the output, in any number format.
        x: feature map.
        normalization: of it.
        kernel_size: odd height and width of the kernel.

    Returns:
        Gradient in the number format of the mean.
    """
    assert gradient.shape == x.shape
    assert kernel_size % 2 == 1
    x, gradient = _channels_last(x), _channels_last(gradient)
    num_patches, num_tiles, num_blocks, shape = _patch_tiles(x)
    num_parts = _num_parts(num_tiles, num_blocks)
    partials = normalization.mean.new_empty(num_parts, kernel_size**2, x.shape[1])
    _launch(
        _depthwise_kernel_gradient_kernel, num_parts * num_blocks, gradient, x,
        *normalization.tensors(x), partials, *x.shape[2:], num_patches,
        SWISH=normalization.swish, SIZE=kernel_size, **shape,
    )  # fmt: skip
    return partials.sum(0).t().reshape(-1, 1, kernel_size, kernel_size)
