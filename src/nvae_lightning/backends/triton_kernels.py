# Kernels are written in Triton's language, which types arguments itself and only adds tuples.
# ruff: noqa: ANN001, ANN201, ANN202, D103, RUF005
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
r"""Triton kernels of batch normalisation, swish and depthwise convolution.

.. math::

    \hat x = (x - \mu) / \sigma, \quad u = \gamma \hat x + \beta, \quad
    a = u \, \mathrm{sigmoid}(u) \text{ with swish, else } u

Feature maps are in channels_last layout. Values are computed and summed in the dtype of the
statistics and rounded once. The order of summation depends only on shapes, so results are
reproducible bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton does not exist for macOS and Windows
    HAS_TRITON = False
else:
    # The first version whose functions take and return tuples of tiles.
    HAS_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


def _jit(function: Callable[..., Any]) -> Any:  # noqa: ANN401
    """Compile a kernel at its first call, without the type checker's wrapper."""
    return triton.jit(inspect.unwrap(function)) if HAS_TRITON else function


# --------------------------------------------------------------------------------------------
# Parts of kernels. A tile is (pixels or patches, channels).


@_jit
def _locate_channels(CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Return index and number of programs of these channels, the channels, and their mask.

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
    """Return the offsets of a tile's values and their mask."""
    # In 64 bits: a feature map may have more than 2^31 values.
    pixel = tl.cast(tile, tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[:, None]
    return pixel * CHANNELS + channel, (pixel < num_pixels) & is_channel


@_jit
def _locate_patches(
    block, num_patches, height, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_PATCHES: tl.constexpr,
):  # fmt: skip
    """Return image, top row and left column of each patch, shape (patch, 1), and their mask.

    Neighbours in a row follow each other, because they share pixels.
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
    """Load neighbouring pixels of a row, one tile each, with zeros outside the image."""
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
    """Compute the gradient of u from the gradient of a."""
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
    """Add the contribution of one row of input to the SIZE rows of output that it reaches.

    Returns:
        The top row, which is then complete, and the others.
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
def statistics_kernel(
    x, shifts, partials, num_pixels,
    CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum x minus a shift, and its square, over a part of the pixels: (part, 2, channel).

    The shift is the mean of the first pixels. Without it, the difference between the mean square
    and the squared mean would cancel for large values.
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
def moments_kernel(
    partials, shifts, means, variances, num_parts, num_pixels,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute mean and biased variance of each channel from the sums of `statistics_kernel`."""
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
def normalize_kernel(
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
def normalize_sums_kernel(
    gradient, x, means, inverse_stds, weights, biases, partials, num_pixels, SWISH: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum over a part of the pixels: (part, 2, channel)."""
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
def normalize_gradient_kernel(
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
def depthwise_kernel(
    x, kernel, output, height, width, num_patches,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_PATCHES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Convolve patches of ROWS by COLUMNS output pixels, walking down their rows of input.

    A thread computes the same channels of all columns, so it reads a pixel once, not per tap.
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
