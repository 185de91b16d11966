r"""Families of kernels that normalise, activate and convolve in few passes over feature maps.

.. math::

    \hat x = (x - \mu) / \sigma, \quad u = \gamma \hat x + \beta, \quad
    a = u \, \mathrm{sigmoid}(u) \text{ with swish, else } u

Each family computes the same: PyTorch's operations, loops that its compiler generates from
formulas, and Triton kernels. Of the feature maps, none keeps more than :math:`x` for the backward
pass.

Source: Vahdat & Kautz 2020, Sec. 3.1.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nvae_lightning.backends import triton_operations
from nvae_lightning.backends.convolution import Convolution, Depthwise, KernelGradient
from nvae_lightning.model.shapes import FeatureMap, PerChannel

#: Turns sums (2, channel) over this rank's batch into means over the batches of all ranks.
Share = Callable[[Float[Tensor, "2 channel"]], Float[Tensor, "2 channel"]]

_EPS = 1e-5  # in torch's statistics, which it returns as inverse standard deviations
_TINY = 1e-30  # the variance includes its epsilon already, but torch requires a positive one


class Affine(NamedTuple):
    r"""Parameters per channel that turn x into u.

    Args:
        mean: Mean :math:`\mu`.
        inverse_std: Inverse standard deviation :math:`1 / \sigma`.
        weight: Scale :math:`\gamma`.
        bias: Shift :math:`\beta`.
    """

    mean: PerChannel
    inverse_std: PerChannel
    weight: PerChannel
    bias: PerChannel


class TorchKernels:
    """PyTorch's own operations."""

    #: Depthwise convolution and the gradient of its kernel; None for torch's.
    depthwise: Depthwise | None = None
    depthwise_kernel_gradient: KernelGradient | None = None

    def on(self, device: torch.device) -> TorchKernels:
        """Return the kernels to use on a device."""
        return self

    def statistics(self, x: FeatureMap) -> tuple[PerChannel, PerChannel]:
        """Return mean and biased variance of each channel, in float32 or float64."""
        if x.is_cuda:  # one pass, without a copy in float32
            mean, inverse_std = torch.batch_norm_stats(x, _EPS)
            return mean, (inverse_std.pow(-2) - _EPS).clamp_min(0.0)
        values = widened(x)
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
        r"""Return the gradients of x, weight and bias, through the statistics as well.

        .. math::

            \partial x = \frac{\gamma}{\sigma} \left(\partial u - E[\partial u]
            - \hat x \, E[\partial u \, \hat x] \right)

        Args:
            gradient: Gradient of a.
            x: Feature map.
            affine: Parameters of its normalisation.
            swish: Whether swish follows.
            share: Turns sums over this rank's batch into means over all ranks'.
        """
        if swish:
            gradient = torch.ops.aten.silu_backward(
                gradient, self.normalize(x, affine, swish=False)
            )
        mean, inverse_std, weight, _ = affine
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
        self, x: FeatureMap, affine: Affine, swish: bool, convolution: Convolution
    ) -> FeatureMap:
        """Convolve a."""
        a = self.normalize(x, affine, swish).to(convolution.kernel.dtype)
        return convolution.apply(a, self.depthwise)

    def convolve_gradients(
        self, gradient: FeatureMap, x: FeatureMap, affine: Affine, swish: bool,
        convolution: Convolution, share: Share,
    ) -> tuple[FeatureMap, PerChannel, PerChannel, Tensor, Tensor | None]:  # fmt: skip
        """Return the gradients of x, weight, bias, kernel and the kernel's bias."""
        a = self.normalize(x, affine, swish).to(convolution.kernel.dtype)
        grad_a, grad_kernel, grad_kernel_bias = convolution.gradients(
            gradient, a, self.depthwise, self.depthwise_kernel_gradient
        )
        del a
        grad_inputs = self.normalize_gradients(grad_a.to(x.dtype), x, affine, swish, share)
        return *grad_inputs, grad_kernel, grad_kernel_bias


class TritonKernels(TorchKernels):
    """Triton kernels, for GPUs."""

    depthwise = staticmethod(triton_operations.depthwise)

    def on(self, device: torch.device) -> TorchKernels:
        """Return these kernels; ValueError on a device without Triton."""
        if not triton_operations.is_available(device):
            raise ValueError(
                f"compute.kernels: got triton, which requires the package triton and a GPU of "
                f"compute capability 8.0 or more, but the device is '{device}'; set "
                "compute.kernels=auto"
            )
        return self

    def statistics(self, x: FeatureMap) -> tuple[PerChannel, PerChannel]:
        """Return mean and biased variance of each channel."""
        return triton_operations.statistics(x)

    def normalize(self, x: FeatureMap, affine: Affine, swish: bool) -> FeatureMap:
        """Compute a."""
        return triton_operations.normalize(x, triton_operations.Normalization(*affine, swish))

    def normalize_gradients(
        self, gradient: FeatureMap, x: FeatureMap, affine: Affine, swish: bool, share: Share
    ) -> tuple[FeatureMap, PerChannel, PerChannel]:
        """Return what :meth:`TorchKernels.normalize_gradients` does."""
        normalization = triton_operations.Normalization(*affine, swish)
        sums = triton_operations.normalize_sums(gradient, x, normalization)
        grad_x = triton_operations.normalize_gradient(gradient, x, normalization, share(sums))
        grad_bias, grad_weight = sums
        return grad_x, grad_weight, grad_bias


class AutoKernels(TorchKernels):
    """Triton kernels on GPUs that support them, others elsewhere.

    Args:
        elsewhere: Kernels on other devices.
    """

    def __init__(self, elsewhere: TorchKernels) -> None:
        self._triton, self._elsewhere = TritonKernels(), elsewhere

    def on(self, device: torch.device) -> TorchKernels:
        """Return the kernels to use on a device."""
        return self._triton if triton_operations.is_available(device) else self._elsewhere


def widened(x: Tensor) -> Tensor:
    """Lift to the dtype that statistics are computed in: float32, or float64 where x is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_channel(values: PerChannel) -> Tensor:
    return values[:, None, None]
