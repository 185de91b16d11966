"""A convolution's arguments as a value, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nvae_lightning.model.layers import WeightNormConv2d, weight_norm
from nvae_lightning.model.shapes import FeatureMap, PerChannel

#: Depthwise convolution, given the input and the kernel.
Depthwise = Callable[[FeatureMap, Tensor], FeatureMap]
#: Gradient of a depthwise kernel, given the output's gradient, the input and the convolution.
KernelGradient = Callable[[FeatureMap, FeatureMap, "Convolution"], Tensor]

#: In 16 bits, tensor cores require a multiple of this number of channels. On an H200 a 3x3
#: convolution of 60 channels takes three times as long as one of 64, its gradients four times.
_ALIGNMENT = 8


class Geometry(NamedTuple):
    """Stride, padding by zeros, dilation and groups of a convolution, as in ``F.conv2d``."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Convolution:
    """Arguments of ``F.conv2d`` without the input.

    Args:
        kernel: Effective weight, after weight normalisation.
        bias: Bias per output channel, or None.
        geometry: Stride, padding, dilation and groups.
    """

    kernel: Float[Tensor, "out in height width"]
    bias: Float[Tensor, " out"] | None
    geometry: Geometry

    @classmethod
    def of(cls, layer: nn.Module) -> Convolution | None:
        """Return a layer's convolution; None unless it is a plain one with zero padding."""
        if type(layer) not in (nn.Conv2d, WeightNormConv2d):
            return None
        assert isinstance(layer, nn.Conv2d)
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return None
        kernel = layer.weight
        if isinstance(layer, WeightNormConv2d):
            kernel = weight_norm(layer.unnormalized_weight(), layer.log_gain)
        geometry = Geometry(
            stride=(layer.stride[0], layer.stride[1]),
            padding=(layer.padding[0], layer.padding[1]),
            dilation=(layer.dilation[0], layer.dilation[1]),
            groups=layer.groups,
        )
        return cls(kernel, layer.bias, geometry)

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel depends on its own input channel and keeps its size."""
        stride, padding, dilation, groups = self.geometry
        out_channels, in_channels, height, width = self.kernel.shape
        return (
            groups == out_channels
            and in_channels == stride[0] == stride[1] == dilation[0] == dilation[1] == 1
            and height == width == 2 * padding[0] + 1 == 2 * padding[1] + 1
        )

    @property
    def is_pointwise(self) -> bool:
        """Whether this is a 1x1 convolution over all channels."""
        _, padding, _, groups = self.geometry
        return groups == 1 and self.kernel.shape[2:] == (1, 1) and padding == (0, 0)

    def behind(self, scale: PerChannel, shift: PerChannel) -> Convolution:
        r"""Fold a preceding affine map into this pointwise convolution.

        .. math:: W (s x + t) + b = (W s) x + (W t + b)

        Args:
            scale: :math:`s`, per input channel.
            shift: :math:`t`, per input channel.
        """
        bias = self.kernel.flatten(1) @ shift
        if self.bias is not None:
            bias = bias + self.bias
        return Convolution(self.kernel * scale[:, None, None], bias, self.geometry)

    def followed_by(self, scale: PerChannel, shift: PerChannel) -> Convolution:
        r"""Fold a following affine map into this convolution.

        .. math:: s (W x + b) + t = (s W) x + (s b + t)

        Args:
            scale: :math:`s`, per output channel.
            shift: :math:`t`, per output channel.
        """
        bias = shift if self.bias is None else self.bias * scale + shift
        return Convolution(self.kernel * scale[:, None, None, None], bias, self.geometry)

    def cast(self, device: str) -> Convolution:
        """Cast the weights to autocast's dtype, if autocast is on; keep float64."""
        if not torch.is_autocast_enabled(device) or self.kernel.dtype == torch.float64:
            return self
        dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(dtype)
        return Convolution(self.kernel.to(dtype), bias, self.geometry)

    def apply(self, x: FeatureMap, depthwise: Depthwise | None = None) -> FeatureMap:
        """Convolve.

        Args:
            x: Input.
            depthwise: Implementation of depthwise convolutions; None for torch's.
        """
        if depthwise is not None and self.is_depthwise and self.bias is None:
            return depthwise(x, self.kernel)
        if self._is_misaligned(x.device):
            output = self._padded().apply(_pad_channels(x))
            return _first_channels(output, len(self.kernel))
        return F.conv2d(x, self.kernel, self.bias, *self.geometry)

    def gradients(
        self,
        gradient: FeatureMap,
        x: FeatureMap,
        depthwise: Depthwise | None = None,
        kernel_gradient: KernelGradient | None = None,
    ) -> tuple[FeatureMap, Tensor, Tensor | None]:
        """Return the gradients of input, kernel and bias.

        Args:
            gradient: Gradient of the output.
            x: Input.
            depthwise: Implementation of depthwise convolutions; None for torch's.
            kernel_gradient: Implementation of the gradient of a depthwise kernel; None for
                torch's.
        """
        stride, padding, dilation, groups = self.geometry
        if self.is_depthwise:
            # Faster than the input gradient of oneDNN and cuDNN.
            reverse = Convolution(self.kernel.flip(2, 3), None, self.geometry)
            grad_x = reverse.apply(gradient, depthwise)
            grad_kernel = (kernel_gradient or depthwise_kernel_gradient)(gradient, x, self)
            grad_bias = None if self.bias is None else gradient.sum((0, 2, 3))
            return grad_x, grad_kernel, grad_bias
        if self._is_misaligned(x.device):
            out_channels, in_channels = self.kernel.shape[:2]
            grad_x, grad_kernel, grad_bias = self._padded().gradients(
                _pad_channels(gradient), _pad_channels(x)
            )
            return (
                _first_channels(grad_x, in_channels),
                grad_kernel[:out_channels, :in_channels],
                None if grad_bias is None else grad_bias[:out_channels],
            )
        return torch.ops.aten.convolution_backward(
            gradient, x, self.kernel, [len(self.kernel)], list(stride), list(padding),
            list(dilation), False, [0, 0], groups, [True, True, self.bias is not None],
        )  # fmt: skip

    def _is_misaligned(self, device: torch.device) -> bool:
        """Whether padding its channels with zeros makes it faster."""
        out_channels, in_channels, height, width = self.kernel.shape
        return (
            _has_tensor_cores(device, self.kernel.dtype)
            and self.geometry.groups == 1
            and height * width > 1
            and (out_channels % _ALIGNMENT > 0 or in_channels % _ALIGNMENT > 0)
        )

    def _padded(self) -> Convolution:
        """Append channels of zeros."""
        out_channels, in_channels = (-size % _ALIGNMENT for size in self.kernel.shape[:2])
        kernel = F.pad(self.kernel, (0, 0, 0, 0, 0, in_channels, 0, out_channels))
        bias = None if self.bias is None else F.pad(self.bias, (0, out_channels))
        return Convolution(kernel, bias, self.geometry)


def _has_tensor_cores(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _pad_channels(x: FeatureMap) -> FeatureMap:
    lacking = -x.shape[1] % _ALIGNMENT
    return F.pad(x, (0, 0, 0, 0, 0, lacking)) if lacking else x  # empty padding would copy


def _first_channels(x: FeatureMap, count: int) -> FeatureMap:
    return x[:, :count].contiguous(memory_format=torch.channels_last)


def depthwise_kernel_gradient(
    gradient: FeatureMap, x: FeatureMap, convolution: Convolution
) -> Float[Tensor, "channel 1 height width"]:
    """Return the gradient of a depthwise kernel, computed by torch."""
    stride, padding, dilation, groups = convolution.geometry
    kernel = convolution.kernel
    dtype = kernel.dtype
    if x.device.type == "cpu":  # oneDNN takes twice as long in 16 bits
        dtype = torch.promote_types(dtype, torch.float32)
    grad_kernel = torch.ops.aten.convolution_backward(
        gradient.to(dtype), x.to(dtype), kernel.to(dtype), None, list(stride), list(padding),
        list(dilation), False, [0, 0], groups, [False, True, False],
    )[1]  # fmt: skip
    return grad_kernel.to(kernel.dtype)
