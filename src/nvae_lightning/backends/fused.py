"""Normalisation, swish and convolution as one differentiable function."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvae_lightning.backends.convolution import Convolution, Geometry
from nvae_lightning.backends.kernels import Affine, TorchKernels
from nvae_lightning.model.normalization import BatchNorm, num_ranks
from nvae_lightning.model.shapes import FeatureMap


def normalize(
    norm: BatchNorm,
    x: FeatureMap,
    kernels: TorchKernels,
    *,
    swish: bool = False,
    convolution: Convolution | None = None,
) -> FeatureMap:
    """Normalise by a training batch, apply swish and convolve, keeping only x for the backward.

    Args:
        norm: Normalisation, whose running statistics move.
        x: Feature map.
        kernels: Implementation.
        swish: Whether swish follows the normalisation.
        convolution: Convolution that comes last; None for none.

    Raises:
        ValueError: If there is only one value per channel.
    """
    running = norm.count_batch(x)
    kernel = bias = geometry = None
    if convolution is not None:
        convolution = convolution.cast(x.device.type)
        kernel, bias, geometry = convolution.kernel, convolution.bias, convolution.geometry
    return _NormalizeAndConvolve.apply(
        x, norm.weight, norm.bias, kernel, bias, *running, (norm.momentum, norm.eps, swish),
        geometry, kernels,
    )  # fmt: skip


class _NormalizeAndConvolve(torch.autograd.Function):
    """Normalise by the statistics of all ranks' batches, then optionally swish and convolve.

    Of the feature maps only the input is saved; the backward pass recomputes the others. That is
    the paper's trick (Sec. 3.1.3), which here extends to the convolution's input.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        kernel: Tensor | None,
        kernel_bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        settings: tuple[float, float, bool],
        geometry: Geometry | None,
        kernels: TorchKernels,
    ) -> Tensor:
        momentum, eps, swish = settings
        mean, var = kernels.statistics(x)
        num_values: int | Tensor = x.numel() // x.shape[1]  # per channel
        if num_ranks() > 1:
            mean, var, num_values = _over_ranks(mean, var, num_values)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        unbiased = var * (num_values / (num_values - 1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        affine = Affine(mean, (var + eps).rsqrt(), weight.to(mean.dtype), bias.to(mean.dtype))
        ctx.save_for_backward(x, *affine, kernel, kernel_bias)
        ctx.num_values, ctx.swish, ctx.geometry, ctx.kernels = num_values, swish, geometry, kernels
        if kernel is None:
            return kernels.normalize(x, affine, swish)
        assert geometry is not None
        return kernels.convolve(x, affine, swish, Convolution(kernel, kernel_bias, geometry))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] -- of one output
        ctx: Any,  # noqa: ANN401
        gradient: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, *affine, kernel, kernel_bias = ctx.saved_tensors

        def share(sums: Tensor) -> Tensor:
            if num_ranks() > 1:
                sums = sums.clone()
                torch.distributed.all_reduce(sums)
            return sums / ctx.num_values

        if kernel is None:
            grads = ctx.kernels.normalize_gradients(gradient, x, Affine(*affine), ctx.swish, share)
            return *grads, *(None,) * 7
        grads = ctx.kernels.convolve_gradients(
            gradient, x, Affine(*affine), ctx.swish,
            Convolution(kernel, kernel_bias, ctx.geometry), share,
        )  # fmt: skip
        return *grads, *(None,) * 5


def _over_ranks(mean: Tensor, var: Tensor, num_values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge mean, variance and count per channel of ranks whose batches may differ in size."""
    own = torch.cat([mean.new_full((1,), num_values), mean, var])
    gathered = [torch.empty_like(own) for _ in range(num_ranks())]
    torch.distributed.all_gather(gathered, own)
    every = torch.stack(gathered)
    counts, means, variances = every.split([1, len(mean), len(mean)], 1)
    share = counts / counts.sum()
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, counts.sum()
