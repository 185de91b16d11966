r"""Normalisation, swish and the convolution after them, in few passes over the feature maps.

.. math::

    \hat x = (x - \mu) / \sigma, \quad u = \gamma \hat x + \beta, \quad
    a = u \, \sigma(u) \text{ with swish, else } u

There are three ways to compute one thing: PyTorch's operations, loops that its compiler makes of
formulas, and Triton kernels. Of the feature maps none keeps more than :math:`x` from the forward
to the backward pass.

Source: Vahdat & Kautz 2020, Sec. 3.1.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, library

from nvae_lightning.model import kernels
from nvae_lightning.model.compiler import compiled
from nvae_lightning.model.convolution import (
    Convolution,
    Depthwise,
    FeatureMap,
    KernelGradient,
    PerChannel,
    depthwise_kernel_gradient,
)

Rows = Float[Tensor, "batch pixel channel"]

#: Given sums (2, channel) over this rank's batch: their means over the batches of all ranks.
Share = Callable[[Float[Tensor, "2 channel"]], Float[Tensor, "2 channel"]]

_EPS = 1e-5  # of torch's statistics, which come as inverse standard deviations
_TINY = 1e-30  # added to a variance that has its epsilon, as torch refuses to add nothing


class Affine(NamedTuple):
    r"""What turns x into u, per channel.

    Args:
        mean: :math:`\mu`.
        inverse_std: :math:`1 / \sigma`.
        weight: :math:`\gamma`.
        bias: :math:`\beta`.
    """

    mean: PerChannel
    inverse_std: PerChannel
    weight: PerChannel
    bias: PerChannel


class TorchKernels:
    """PyTorch's own operations."""

    #: How to compute a depthwise convolution and the gradient of its kernel, if not by torch.
    depthwise: Depthwise | None = None
    depthwise_kernel_gradient: KernelGradient | None = None

    def on(self, device: torch.device) -> TorchKernels:
        """Choose what computes on a device."""
        return self

    def statistics(self, x: FeatureMap) -> tuple[PerChannel, PerChannel]:
        """Mean and biased variance of each channel, in float32 or more."""
        if x.is_cuda:  # one pass over the numbers as they are
            mean, inverse_std = torch.batch_norm_stats(x, _EPS)
            return mean, (inverse_std.pow(-2) - _EPS).clamp_min(0.0)
        values = _wide(x)
        mean = values.mean((0, 2, 3))
        # torch.var_mean takes ten times as long on a CPU.
        return mean, (values - _by_channel(mean)).square().mean((0, 2, 3))

    def normalize(self, x: FeatureMap, affine: Affine, swish: bool) -> FeatureMap:
        """Compute a."""
        mean, inverse_std, weight, bias = affine
        u = F.batch_norm(x, mean, inverse_std.pow(-2), weight, bias, eps=_TINY)
        return F.silu(u, inplace=True) if swish else u

    def normalize_gradients(
        self, gradient: FeatureMap, x: FeatureMap, affine: Affine, swish: bool, share: Share
    ) -> tuple[FeatureMap, PerChannel, PerChannel]:
        r"""Gradients of x, weight and bias, through the statistics too.

        .. math::

            \partial x = \frac{\gamma}{\sigma} \left(\partial u - E[\partial u]
            - \hat x \, E[\partial u \, \hat x] \right)

        Args:
            gradient: of a.
            x: feature map.
            affine: what it was normalised by.
            swish: whether a is behind a swish.
            share: turns sums over this rank's batch into means over all ranks'.
        """
        if swish:
            gradient = torch.ops.aten.silu_backward(
                gradient, self.normalize(x, affine, swish=False)
            )
        mean, inverse_std, weight, _ = affine
        if x.is_cuda:
            sum_du, sum_du_centred, for_weight, for_bias = torch.batch_norm_backward_reduce(
                gradient, x, mean, inverse_std, weight, True, True, True
            )
            mean_du, mean_du_centred = share(torch.stack([sum_du, sum_du_centred]))
            one = torch.ones(1, dtype=torch.int32, device=x.device)
            for_x = torch.batch_norm_backward_elemt(
                gradient, x, mean, inverse_std, weight, mean_du, mean_du_centred, one
            )
            return for_x, for_weight, for_bias
        wide = _wide(gradient)
        centred = _wide(x) - _by_channel(mean)
        for_bias = wide.sum((0, 2, 3))
        for_weight = (wide * centred).sum((0, 2, 3)) * inverse_std
        along_one, along_normalized = share(torch.stack([for_bias, for_weight]))
        scale = weight * inverse_std
        for_x = centred.mul_(_by_channel(-scale * inverse_std * along_normalized))
        for_x = for_x.sub_(_by_channel(scale * along_one))
        for_x = for_x.addcmul_(wide, _by_channel(scale))
        return for_x.to(x.dtype), for_weight, for_bias

    def convolve(
        self, x: FeatureMap, affine: Affine, swish: bool, convolution: Convolution
    ) -> FeatureMap:
        """Convolve a."""
        a = self.normalize(x, affine, swish).to(convolution.kernel.dtype)
        return convolution.apply(a, self.depthwise)

    def convolve_gradients(
        self, gradient: FeatureMap, x: FeatureMap, affine: Affine, swish: bool,
        convolution: Convolution, share: Share,
    ) -> tuple[FeatureMap, PerChannel, PerChannel, Tensor, Tensor | None]:  # fmt: skip
        """Gradients of x, scale, shift, kernel and the kernel's bias."""
        a = self.normalize(x, affine, swish).to(convolution.kernel.dtype)
        for_a, for_kernel, for_kernel_bias = convolution.gradients(
            gradient, a, self.depthwise, self.depthwise_kernel_gradient
        )
        del a
        for_inputs = self.normalize_gradients(for_a.to(x.dtype), x, affine, swish, share)
        return *for_inputs, for_kernel, for_kernel_bias


class CompiledKernels(TorchKernels):
    """Loops that torch's compiler makes of formulas, each when it is first needed."""

    def statistics(self, x: FeatureMap) -> tuple[PerChannel, PerChannel]:
        """Mean and biased variance of each channel."""
        return _statistics(_rows(x))

    def normalize(self, x: FeatureMap, affine: Affine, swish: bool) -> FeatureMap:
        """Compute a."""
        return _as_map(_normalize(_rows(x), *affine, swish), x)

    def normalize_gradients(
        self, gradient: FeatureMap, x: FeatureMap, affine: Affine, swish: bool, share: Share
    ) -> tuple[FeatureMap, PerChannel, PerChannel]:
        """As TorchKernels'."""
        rows, gradients = _rows(x), _rows(gradient)
        if swish and x.device.type == "cpu":
            gradients, sums = swish_gradient_and_sums(gradients, rows, *affine)
        else:
            if swish:
                gradients = _swish_gradient(gradients, rows, *affine)
            sums = _sums(gradients, rows, affine.mean, affine.inverse_std)
        for_bias, for_weight = sums
        for_x = _normalize_gradient(gradients, rows, *affine[:3], share(sums))
        return _as_map(for_x, x), for_weight, for_bias

    @staticmethod
    def depthwise_kernel_gradient(
        gradient: FeatureMap, x: FeatureMap, convolution: Convolution
    ) -> Tensor:
        """Gradient of a depthwise kernel; on a CPU all its taps in one loop."""
        if x.device.type != "cpu":
            return depthwise_kernel_gradient(gradient, x, convolution)
        taps = depthwise_taps_gradient(gradient, x, convolution.kernel.shape[-1])
        return taps.view_as(convolution.kernel).to(convolution.kernel.dtype)


class TritonKernels(TorchKernels):
    """Triton kernels, for GPUs."""

    depthwise = staticmethod(kernels.depthwise)

    def on(self, device: torch.device) -> TorchKernels:
        """Refuse devices without Triton."""
        if not kernels.is_available(device):
            raise ValueError(
                f"compute.kernels: got triton, which cannot be had on '{device}': it takes a GPU "
                "of compute capability 8.0 or more and the package triton; set "
                "compute.kernels=auto"
            )
        return self

    def statistics(self, x: FeatureMap) -> tuple[PerChannel, PerChannel]:
        """Mean and biased variance of each channel."""
        return kernels.statistics(x)

    def normalize(self, x: FeatureMap, affine: Affine, swish: bool) -> FeatureMap:
        """Compute a."""
        return kernels.normalize(x, kernels.Normalization(*affine, swish))

    def normalize_gradients(
        self, gradient: FeatureMap, x: FeatureMap, affine: Affine, swish: bool, share: Share
    ) -> tuple[FeatureMap, PerChannel, PerChannel]:
        """As TorchKernels'."""
        normalization = kernels.Normalization(*affine, swish)
        sums = kernels.normalize_sums(gradient, x, normalization)
        for_x = kernels.normalize_gradient(gradient, x, normalization, share(sums))
        for_bias, for_weight = sums
        return for_x, for_weight, for_bias


class AutoKernels(TorchKernels):
    """Triton kernels on GPUs that have them, others elsewhere.

    Args:
        elsewhere: those others.
    """

    def __init__(self, elsewhere: TorchKernels) -> None:
        self._triton, self._elsewhere = TritonKernels(), elsewhere

    def on(self, device: torch.device) -> TorchKernels:
        """Choose what computes on a device."""
        return self._triton if kernels.is_available(device) else self._elsewhere


def _wide(x: Tensor) -> Tensor:
    """In the number format that statistics are taken in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_channel(values: PerChannel) -> Tensor:
    return values[:, None, None]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _rows(x: FeatureMap) -> Rows:
    """Pixels one after the other: one loop then does for all heights and widths."""
    return _channels_last(x).permute(0, 2, 3, 1).flatten(1, 2)


def _as_map(rows: Rows, like: FeatureMap) -> FeatureMap:
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------------
# Formulas


def _sum(values: Tensor) -> Tensor:  # compilers cannot follow a type checker of shapes
    # First within an image: loops that go over all images by columns miss the caches.
    return values.sum(1).sum(0)


@compiled(dynamic=True)
def _statistics(x: Rows) -> tuple[PerChannel, PerChannel]:
    values, count = _wide(x), x.shape[0] * x.shape[1]
    mean = _sum(values) / count
    return mean, _sum((values - mean).square()) / count


@compiled(dynamic=True)
def _normalize(
    x: Rows, mean: PerChannel, inverse_std: PerChannel, weight: PerChannel, bias: PerChannel,
    swish: bool,
) -> Rows:  # fmt: skip
    u = (_wide(x) - mean) * (inverse_std * weight) + bias
    return (F.silu(u) if swish else u).to(x.dtype)


@compiled(dynamic=True)
def _swish_gradient(
    gradient: Rows, x: Rows, mean: PerChannel, inverse_std: PerChannel, weight: PerChannel,
    bias: PerChannel,
) -> Rows:  # fmt: skip
    u = (_wide(x) - mean) * (inverse_std * weight) + bias
    sigmoid = torch.sigmoid(u)
    return (_wide(gradient) * sigmoid * (1.0 + u * (1.0 - sigmoid))).to(x.dtype)


@compiled(dynamic=True)
def _sums(
    gradient: Rows, x: Rows, mean: PerChannel, inverse_std: PerChannel
) -> Float[Tensor, "2 channel"]:
    wide = _wide(gradient)
    return torch.stack([_sum(wide), _sum(wide * (_wide(x) - mean)) * inverse_std])


@compiled(dynamic=True)
def _normalize_gradient(
    gradient: Rows, x: Rows, mean: PerChannel, inverse_std: PerChannel, weight: PerChannel,
    means: Float[Tensor, "2 channel"],
) -> Rows:  # fmt: skip
    normalized = (_wide(x) - mean) * inverse_std
    along_one, along_normalized = means
    for_x = _wide(gradient) - along_one - normalized * along_normalized
    return (for_x * (weight * inverse_std)).to(x.dtype)


@library.custom_op(
    "nvae_lightning::swish_gradient_and_sums",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor mean, Tensor inverse_std, Tensor weight, "
    "Tensor bias) -> (Tensor, Tensor)",
)
def swish_gradient_and_sums(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of u and its sums; an operation that compilers leave whole.

    They would compute the exponentials, which cost a CPU more than memory does, once for the sums
    and once more for the gradient of x.
    """
    for_u = _swish_gradient(gradient, x, mean, inverse_std, weight, bias)
    return for_u, _sums(for_u, x, mean, inverse_std)


@swish_gradient_and_sums.register_fake
def _(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), mean.new_empty(2, len(mean))


@library.custom_op(
    "nvae_lightning::depthwise_taps_gradient",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, int size) -> Tensor",
)
def depthwise_taps_gradient(gradient: Tensor, x: Tensor, size: int) -> Tensor:
    """Gradient (channel, tap) of a depthwise kernel; an operation that compilers leave whole.

    In one loop with what x is computed from, they would compute that once per tap.
    """
    # One loop per shape, which are more than the eight that torch allows by default.
    with torch._dynamo.config.patch(recompile_limit=256):
        return _taps_gradient(_channels_last(gradient), _channels_last(x), size)


@depthwise_taps_gradient.register_fake
def _(gradient: Tensor, x: Tensor, size: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((x.shape[1], size * size), dtype=dtype)


@compiled(dynamic=False)
def _taps_gradient(gradient: FeatureMap, x: FeatureMap, size: int) -> Float[Tensor, "channel tap"]:
    padded = _wide(F.pad(x, (size // 2,) * 4))
    rows, columns = gradient.shape[2:]
    return torch.stack(
        [
            # First within an image, as in _sum.
            (padded[:, :, i : i + rows, j : j + columns] * _wide(gradient)).sum((2, 3)).sum(0)
            for i in range(size)
            for j in range(size)
        ],
        1,
    )
