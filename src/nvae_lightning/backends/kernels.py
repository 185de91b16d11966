r"""Fused normalisation, swish and convolution, as one differentiable function.

.. math::

    \hat x = (x - \mu) / \sigma, \quad u = \gamma \hat x + \beta, \quad
    a = u \, \mathrm{sigmoid}(u) \text{ with swish, else } u

Families of kernels compute the same with PyTorch's operations, with loops that its compiler
generates (:mod:`~nvae_lightning.backends.compiled`) and with Triton
(:mod:`~nvae_lightning.backends.triton_operations`). Of the feature maps only :math:`x` is kept
for the backward pass, which recomputes the others.

Source: Vahdat & Kautz 2020, Sec. 3.1.3, here extended to the input of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvae_lightning.backends.convolution import Convolution, Depthwise, Geometry, KernelGradient
from nvae_lightning.model.normalization import BatchNorm, num_ranks
from nvae_lightning.model.shapes import FeatureMap, PerChannel

#: Turns sums (2, channel) over this rank's batch into means over those of `BatchNorm.group`.
Share = Callable[[Float[Tensor, "2 channel"]], Float[Tensor, "2 channel"]]

_EPS = 1e-5  # in torch's statistics, which it returns as inverse standard deviations
_TINY = 1e-30  # the variance already includes its epsilon, but torch requires a positive one


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


def normalize(
    norm: BatchNorm,
    x: FeatureMap,
    kernels: TorchKernels,
    *,
    swish: bool = False,
    convolution: Convolution | None = None,
) -> FeatureMap:
    """Normalise a training batch, apply swish and convolve, keeping only x for the backward pass.

    Args:
        norm: Normalisation, whose running statistics are updated.
        x: Feature map.
        kernels: Implementation.
        swish: Whether swish follows the normalisation.
        convolution: Convolution at the end; None for none.

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
    """Normalise with the statistics of `BatchNorm.group`, then apply swish and convolution."""

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
        if num_ranks(BatchNorm.group) > 1:
            mean, var, num_values = _over_ranks(mean, var, num_values)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        unbiased = var * (num_values / (num_values - 1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        tensors = mean, (var + eps).rsqrt(), weight.to(mean.dtype), bias.to(mean.dtype)
        ctx.save_for_backward(x, *tensors, kernel, kernel_bias)
        ctx.num_values, ctx.swish, ctx.geometry, ctx.kernels = num_values, swish, geometry, kernels
        normalization = Normalization(*tensors, swish)
        if kernel is None:
            return kernels.normalize(x, normalization)
        assert geometry is not None
        return kernels.convolve(x, normalization, Convolution(kernel, kernel_bias, geometry))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] -- one output
        ctx: Any,  # noqa: ANN401
        gradient: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, mean, inverse_std, weight, bias, kernel, kernel_bias = ctx.saved_tensors
        normalization = Normalization(mean, inverse_std, weight, bias, ctx.swish)

        def share(sums: Tensor) -> Tensor:
            if num_ranks(BatchNorm.group) > 1:
                sums = sums.clone()
                torch.distributed.all_reduce(sums, group=BatchNorm.group)
            return sums / ctx.num_values

        if kernel is None:
            grads = ctx.kernels.normalize_gradients(gradient, x, normalization, share)
            return *grads, *(None,) * 7
        convolution = Convolution(kernel, kernel_bias, ctx.geometry)
        grads = ctx.kernels.convolve_gradients(gradient, x, normalization, convolution, share)
        return *grads, *(None,) * 5


def _over_ranks(mean: Tensor, var: Tensor, num_values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge mean, variance and count per channel of ranks with batches of different sizes."""
    own = torch.cat([mean.new_full((1,), num_values), mean, var])
    gathered = [torch.empty_like(own) for _ in range(num_ranks(BatchNorm.group))]
    torch.distributed.all_gather(gathered, own, group=BatchNorm.group)
    every = torch.stack(gathered)
    counts, means, variances = every.split([1, len(mean), len(mean)], 1)
    share = counts / counts.sum()
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, counts.sum()


class TorchKernels:
    """PyTorch's own operations."""

    #: Depthwise convolution and the gradient of its kernel; None for torch's.
    depthwise: Depthwise | None = None
    depthwise_kernel_gradient: KernelGradient | None = None

    def statistics(self, x: FeatureMap) -> tuple[PerChannel, PerChannel]:
        """Return mean and biased variance of each channel, in float32 or float64."""
        if x.is_cuda:  # one pass, without a copy in float32
            mean, inverse_std = torch.batch_norm_stats(x, _EPS)
            return mean, (inverse_std.pow(-2) - _EPS).clamp_min(0.0)
        values = widened(x)
        mean = values.mean((0, 2, 3))
        # torch.var_mean takes ten times as long on a CPU.
        return mean, (values - _by_channel(mean)).square().mean((0, 2, 3))

    def normalize(self, x: FeatureMap, normalization: Normalization) -> FeatureMap:
        """Compute a."""
        mean, inverse_std, weight, bias, swish = normalization
        u = F.batch_norm(x, mean, inverse_std.pow(-2), weight, bias, eps=_TINY)
        return F.silu(u, inplace=True) if swish else u

    def normalize_gradients(
        self, gradient: FeatureMap, x: FeatureMap, normalization: Normalization, share: Share
    ) -> tuple[FeatureMap, PerChannel, PerChannel]:
        r"""Return the gradients of x, weight and bias, through the statistics as well.

        .. math::

            \partial x = \frac{\gamma}{\sigma} \left(\partial u - E[\partial u]
            - \hat x \, E[\partial u \, \hat x] \right)

        Args:
            gradient: Gradient of a.
            x: Feature map.
            normalization: Its normalisation.
            share: Function from sums over this rank's batch to means over all ranks' batches.
        """
        mean, inverse_std, weight, _, swish = normalization
        if swish:
            u = self.normalize(x, normalization._replace(swish=False))
            gradient = torch.ops.aten.silu_backward(gradient, u)
        if x.is_cuda:
            sum_du, sum_du_centred, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
                gradient, x, mean, inverse_std, weight, True, True, True
            )
            mean_du, mean_du_centred = share(torch.stack([sum_du, sum_du_centred]))
            one = torch.ones(1, dtype=torch.int32, device=x.device)
            grad_x = torch.batch_norm_backward_elemt(
                gradient, x, mean, inverse_std, weight, mean_du, mean_du_centred, one
            )
            return grad_x, grad_weight, grad_bias
        grad = widened(gradient)
        centred = widened(x) - _by_channel(mean)
        grad_bias = grad.sum((0, 2, 3))
        grad_weight = (grad * centred).sum((0, 2, 3)) * inverse_std
        along_one, along_normalized = share(torch.stack([grad_bias, grad_weight]))
        scale = weight * inverse_std
        grad_x = centred.mul_(_by_channel(-scale * inverse_std * along_normalized))
        grad_x = grad_x.sub_(_by_channel(scale * along_one))
        grad_x = grad_x.addcmul_(grad, _by_channel(scale))
        return grad_x.to(x.dtype), grad_weight, grad_bias

    def convolve(
        self, x: FeatureMap, normalization: Normalization, convolution: Convolution
    ) -> FeatureMap:
        """Convolve a."""
        a = self.normalize(x, normalization).to(convolution.kernel.dtype)
        return convolution.apply(a, self.depthwise)

    def convolve_gradients(
        self, gradient: FeatureMap, x: FeatureMap, normalization: Normalization,
        convolution: Convolution, share: Share,
    ) -> tuple[FeatureMap, PerChannel, PerChannel, Tensor, Tensor | None]:  # fmt: skip
        """Return the gradients of x, weight, bias, kernel and the kernel's bias."""
        a = self.normalize(x, normalization).to(convolution.kernel.dtype)
        grad_a, grad_kernel, grad_kernel_bias = convolution.gradients(
            gradient, a, self.depthwise, self.depthwise_kernel_gradient
        )
        del a
        grad_inputs = self.normalize_gradients(grad_a.to(x.dtype), x, normalization, share)
        return *grad_inputs, grad_kernel, grad_kernel_bias


def widened(x: Tensor) -> Tensor:
    """Cast to the dtype of statistics: float32, or float64 for x in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_channel(values: PerChannel) -> Tensor:
    return values[:, None, None]
