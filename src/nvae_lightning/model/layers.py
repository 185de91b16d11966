"""Layers of the residual cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nvae_lightning.model.normalization import mean_over_ranks
from nvae_lightning.model.shapes import FeatureMap


def full_precision(x: Tensor) -> Tensor:
    """Cast 16-bit dtypes to float32, the minimum precision for distributions."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def as_parameters(x: FeatureMap) -> FeatureMap:
    """Prepare a network's output for distributions: full precision, contiguous channels.

    In channels_last layout, a chunk of the channels is strided in memory; elementwise operations
    and random numbers are then several times slower on a CPU.
    """
    return full_precision(x).contiguous()


class NormActConv(nn.Module):
    """Unit of the residual cells: normalisation, activation, convolution.

    Args:
        norm: Normalisation; ``nn.Identity`` for none.
        activation: Elementwise activation; ``nn.Identity`` for none.
        convolution: Convolution, possibly after an upsampling.
    """

    def __init__(self, norm: nn.Module, activation: nn.Module, convolution: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.activation = activation
        self.convolution = convolution

    def forward(self, x: FeatureMap) -> FeatureMap:
        return self.convolution(self.activation(self.norm(x)))


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
    """Convolution with weight normalisation and the arguments of ``nn.Conv2d``.

    The gain starts at the norm of the initial weight plus 0.01.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_gain = nn.Parameter(_initial_log_gain(self.weight))

    def unnormalized_weight(self) -> Tensor:
        """Return the weight before normalisation."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        weight = weight_norm(self.unnormalized_weight(), self.log_gain)
        return self._conv_forward(input, weight, self.bias)


class DataDependentConv2d(WeightNormConv2d):
    """Weight-normalised convolution that sets its gain and bias from the first training batch.

    On that batch every output channel has mean 0 and standard deviation 1. The state dict records
    the initialisation, so that a resumed run does not repeat it.

    Source: Salimans & Kingma 2016, Eq. 6; the IAF-VAE baseline of the paper's Table 2.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.bias is None:
            raise ValueError("bias must be True: data-dependent initialisation sets the bias")
        self.initialized = False

    def get_extra_state(self) -> Tensor:
        """Return whether the layer is initialised, as a tensor like the rest of a state dict."""
        return torch.tensor(self.initialized)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the output of :meth:`get_extra_state`."""
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
            return  # the next batch initialises; the loss of this step reports the problem
        self.log_gain.copy_(-std.log().view_as(self.log_gain))
        self.bias.copy_(-mean / std)
        self.initialized = True

    def forward(self, input: Tensor) -> Tensor:
        if self.training and not self.initialized:
            self._initialize(input)
        return super().forward(input)


class MaskedConv2d(WeightNormConv2d):
    """Convolution with a masked weight, normalised after masking.

    Args:
        mask: Zeros and ones, of the shape of the weight.
        args: Arguments of ``nn.Conv2d``.
        kwargs: Arguments of ``nn.Conv2d``.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Not in the state dict, because the constructor's arguments determine it.
        self.register_buffer("mask", mask.expand_as(self.weight).contiguous(), persistent=False)
        self.log_gain = nn.Parameter(_initial_log_gain(self.weight * self.mask))

    def unnormalized_weight(self) -> Tensor:
        """Return the masked weight."""
        return self.weight * self.mask


def stack_weights(
    convolutions: Sequence[nn.Conv2d],
) -> Float[Tensor, "layer out in height width"]:
    """Stack the effective (masked, normalised) weights of convolutions of one class and shape.

    Takes a few operations for all layers, instead of several per layer.
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

    Each reads one of the four pixels of a 2x2 block and computes a quarter of the output
    channels, so that no pixel is dropped.

    Raises:
        ValueError: If there are fewer than four output channels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if out_channels < 4:
            raise ValueError(
                f"a cell that halves the resolution must have at least 4 output channels, "
                f"got {out_channels}; raise the channels"
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
        """Convolve pixels that were selected by slicing, with stride 1.

        With stride 2, channels_last layout and few channels (such as 12 to 8), oneDNN's backward
        pass writes past its buffers and crashes the process (torch 2.15).
        """
        assert isinstance(part, WeightNormConv2d)
        weight = weight_norm(part.unnormalized_weight(), part.log_gain)
        return F.conv2d(pixels.contiguous(memory_format=torch.channels_last), weight, part.bias)


class SkipUp(nn.Module):
    """Skip connection of an up cell: bilinear doubling and a 1x1 convolution.

    Their order does not matter, because interpolation weights sum to 1. The convolution comes
    first: it then runs on a quarter of the pixels and leaves fewer channels to interpolate.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolution = WeightNormConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: FeatureMap) -> FeatureMap:
        x = self.convolution(x)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
