"""Layers that the residual cells are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nvae_lightning.model.convolution import Convolution, FeatureMap, Geometry
from nvae_lightning.model.normalization import BatchNorm, mean_over_ranks


def full_precision(x: Tensor) -> Tensor:
    """Lift 16-bit numbers to float32: distributions are never computed in fewer bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def as_parameters(x: FeatureMap) -> FeatureMap:
    """Lay a network's output out for distributions: in full precision, each channel in one piece.

    In channels_last layout the halves of the channels lie in pieces of a few numbers each, on
    which elementwise operations and random numbers are several times slower on a CPU.
    """
    return full_precision(x).contiguous()


class ConvolutionalBody(nn.Sequential):
    """Layers one after the other; a convolution behind a normalisation is computed with it.

    Without gradients, on a CPU, normalisations by running statistics become part of the
    convolutions beside them: a fifth more samples a second, compiled or not.

    What is computed together is not called, but for layers with hooks, which are left alone.
    """

    def forward(self, input: FeatureMap) -> FeatureMap:
        if input.device.type == "cpu" and not torch.is_grad_enabled():
            for step in self._folded():
                input = step(input)
            return input
        norm: BatchNorm | None = None
        for layer in map(_unwrapped, self):
            is_fused = torch.is_grad_enabled() or _is_depthwise(layer)
            if norm is not None and is_fused and (known := as_convolution(layer)):
                input, norm = norm(input, known), None
                continue
            if norm is not None:
                input = norm(input)
            norm = layer if isinstance(layer, BatchNorm) else None
            if norm is None:
                input = layer(input)
        return input if norm is None else norm(input)

    def _folded(self) -> list[Callable[[FeatureMap], FeatureMap]]:
        """Layers and convolutions that have taken up the normalisations beside them."""
        steps: list[Callable[[FeatureMap], FeatureMap] | Convolution] = []
        for layer in map(_unwrapped, self):
            last = steps[-1] if steps else None
            if isinstance(last, Convolution) and _is_foldable(layer):
                steps[-1] = last.followed_by(*layer.as_affine())
                if layer.swish:
                    steps.append(partial(F.silu, inplace=True))
            elif (convolution := as_convolution(layer)) is None:
                steps.append(layer)
            elif _is_foldable(last) and not last.swish and convolution.is_pointwise:
                steps[-1] = convolution.behind(*last.as_affine())
            else:
                steps.append(convolution)
        return [step.apply if isinstance(step, Convolution) else step for step in steps]


def _unwrapped(layer: nn.Module) -> nn.Module:
    """Give the normalisation that a layer consists of, or else the layer."""
    return layer.norm if isinstance(layer, BatchNormSwish) and not _has_hooks(layer) else layer


def _is_foldable(layer: object) -> TypeGuard[BatchNorm]:
    """Whether it is a normalisation by running statistics, with swish or without."""
    return isinstance(layer, BatchNorm) and not layer.training and not _has_hooks(layer)


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def as_convolution(layer: nn.Module) -> Convolution | None:
    """Describe what a layer computes; None unless it is a plain convolution padded by zeros."""
    if type(layer) not in (nn.Conv2d, WeightNormConv2d) or _has_hooks(layer):
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
    return Convolution(kernel, layer.bias, geometry)


def _has_hooks(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def batch_norm(channels: int) -> BatchNorm:
    """Batch normalisation without an activation."""
    return BatchNorm(channels)


class BatchNormSwish(nn.Module):
    """Batch normalisation, then swish: ``u * sigmoid(u)``. Source: paper, Sec. 3.1.1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm(channels, swish=True)

    def forward(self, x: FeatureMap) -> FeatureMap:
        return self.norm(x)


class BatchNormELU(nn.Module):
    """Batch normalisation, then ELU. Source: paper, Table 2, second row."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm(channels)

    def forward(self, x: FeatureMap) -> FeatureMap:
        return F.elu(self.norm(x))


class ELUOnly(nn.ELU):
    """ELU without a normalisation before it. Source: paper, Table 2, first row."""

    def __init__(self, channels: int) -> None:
        del channels  # part of the constructors' common signature
        super().__init__()


def weight_norm(
    weight: Float[Tensor, "*stack out in height width"],
    log_gain: Float[Tensor, "*stack out 1 1 1"],
) -> Float[Tensor, "*stack out in height width"]:
    r"""Normalise each filter to a learned norm: :math:`e^{g} W / (\|W\|_2 + 10^{-5})`.

    Source: Salimans & Kingma 2016, with the gain's logarithm as the parameter.
    """
    norm = torch.linalg.vector_norm(weight, dim=(-3, -2, -1), keepdim=True)
    return weight * (log_gain.exp() / (norm + 1e-5))


def _initial_log_gain(weight: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(weight.detach(), dim=(1, 2, 3), keepdim=True)
    return (norm + 1e-2).log()


class WeightNormConv2d(nn.Conv2d):
    """Convolution with weight normalisation; every argument is ``nn.Conv2d``'s.

    The gain starts at the norm of the initial weight plus 0.01.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_gain = nn.Parameter(_initial_log_gain(self.weight))

    def unnormalized_weight(self) -> Tensor:
        """Give the weight before normalisation."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        weight = weight_norm(self.unnormalized_weight(), self.log_gain)
        return self._conv_forward(input, weight, self.bias)


class DataDependentConv2d(WeightNormConv2d):
    """Weight-normalised convolution that sets its gain and bias from the first training batch.

    On that batch every output channel gets mean 0 and standard deviation 1. Whether it has been
    done is part of the state dict, so that a resumed run does not do it again.

    Source: Salimans & Kingma 2016, Eq. 6; the IAF-VAE baseline of the paper's Table 2.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.bias is None:
            raise ValueError("data-dependent initialisation sets a bias: build it with bias=True")
        self.initialized = False

    def get_extra_state(self) -> Tensor:
        """Whether the initialisation has been done; a tensor, as all else in a state dict."""
        return torch.tensor(self.initialized)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` gave."""
        self.initialized = bool(state)

    @torch.no_grad()
    def _initialize(self, input: Tensor) -> None:
        assert self.bias is not None
        self.log_gain.zero_()
        self.bias.zero_()
        output = full_precision(super().forward(input))
        mean = mean_over_ranks(output.mean((0, 2, 3)))
        centred = output - mean[:, None, None]
        std = mean_over_ranks(centred.square().mean((0, 2, 3))).clamp_min(1e-8).sqrt()
        if not (mean.isfinite().all() and std.isfinite().all()):
            return  # the next batch does it; this step's loss says what is wrong
        self.log_gain.copy_(-std.log().view_as(self.log_gain))
        self.bias.copy_(-mean / std)
        self.initialized = True

    def forward(self, input: Tensor) -> Tensor:
        if self.training and not self.initialized:
            self._initialize(input)
        return super().forward(input)


class MaskedConv2d(WeightNormConv2d):
    """Weight-normalised convolution of a masked weight; the norm is that of the masked weight.

    Args:
        mask: zeros and ones of the weight's shape.
        args: ``nn.Conv2d``'s.
        kwargs: ``nn.Conv2d``'s.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Follows from the constructor's arguments, so it is no part of the state dict.
        self.register_buffer("mask", mask.expand_as(self.weight).contiguous(), persistent=False)
        self.log_gain = nn.Parameter(_initial_log_gain(self.weight * self.mask))

    def unnormalized_weight(self) -> Tensor:
        """Give the masked weight."""
        return self.weight * self.mask


def stack_weights(
    convolutions: Sequence[nn.Conv2d],
) -> Float[Tensor, "layer out in height width"]:
    """Weights as used (masked and normalised) of convolutions of one class and shape, stacked.

    One operation for all of them, where asking each in turn would cost several per layer.
    """
    weight = torch.stack([convolution.weight for convolution in convolutions])
    first = convolutions[0]
    if isinstance(first, MaskedConv2d):
        weight = weight * torch.stack(
            [c.mask for c in convolutions if isinstance(c, MaskedConv2d)]
        )
    if isinstance(first, WeightNormConv2d):
        gains = torch.stack([c.log_gain for c in convolutions if isinstance(c, WeightNormConv2d)])
        weight = weight_norm(weight, gains)
    return weight


class SqueezeExcitation(nn.Module):
    """Channel-wise gate from the global mean: Linear, ReLU, Linear, sigmoid.

    Source: Hu et al. 2018; the hidden layer has ``max(channels // 16, 4)`` units.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: FeatureMap) -> FeatureMap:
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class SkipDown(nn.Module):
    """Skip connection of a down cell: swish, then four strided 1x1 convolutions.

    They look at the four pixels of each 2x2 block and share the output channels, so that no
    pixel is dropped.

    Raises:
        ValueError: if there are fewer than four output channels to share.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if out_channels < 4:
            raise ValueError(
                f"a cell that halves the resolution needs at least 4 output channels, "
                f"got {out_channels}: raise the channels"
            )
        quarter = out_channels // 4
        widths = [quarter, quarter, quarter, out_channels - 3 * quarter]
        self.parts = nn.ModuleList(
            WeightNormConv2d(in_channels, width, 1, stride=2) for width in widths
        )

    def forward(self, x: FeatureMap) -> FeatureMap:
        x = F.silu(x)
        shifts = ((0, 0), (1, 1), (0, 1), (1, 0))
        outputs = [
            self._one_pixel_of_four(part, x[:, :, dy::2, dx::2])
            for part, (dy, dx) in zip(self.parts, shifts, strict=True)
        ]
        return torch.cat(outputs, 1)

    @staticmethod
    def _one_pixel_of_four(part: nn.Module, pixels: FeatureMap) -> FeatureMap:
        """Convolve pixels that are picked already, with a stride of 1.

        With its own stride, in channels_last layout and with few channels (12 to 8, say),
        oneDNN's backward pass writes past its buffers: the process crashes (torch 2.15).
        """
        assert isinstance(part, WeightNormConv2d)
        weight = weight_norm(part.unnormalized_weight(), part.log_gain)
        return F.conv2d(pixels.contiguous(memory_format=torch.channels_last), weight, part.bias)


class SkipUp(nn.Module):
    """Skip connection of an up cell: bilinear doubling and a 1x1 convolution.

    Either may come first, as the weights of an interpolation sum to 1. The convolution does: on a
    quarter of the pixels, and leaves fewer channels to interpolate.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolution = WeightNormConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: FeatureMap) -> FeatureMap:
        x = self.convolution(x)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
