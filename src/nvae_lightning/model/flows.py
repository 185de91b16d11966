"""Inverse autoregressive flows that make a group's posterior more expressive (Sec. 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae_lightning.model.layers import MaskedConv2d
from nvae_lightning.model.shapes import FeatureMap


def causal_mask(
    out_channels: int,
    in_channels: int,
    kernel_size: int,
    *,
    strict: bool,
    depthwise: bool = False,
    reverse: bool = False,
) -> Tensor:
    """Return the mask of a convolution that is autoregressive in raster order, then channels.

    The kernel sees the rows above its centre and the pixels to its left. At the centre, output
    block i sees input blocks j < i (``strict``) or j <= i; a depthwise convolution has a single
    input channel.

    Args:
        out_channels: Number of output channels, a multiple or a divisor of ``in_channels``.
        in_channels: Number of input channels.
        kernel_size: Size of the kernel, odd.
        strict: Whether to hide an output's own channel block at the centre.
        depthwise: Whether every output channel sees only its own input channel.
        reverse: Whether to reverse the raster order of pixels (not of channels).

    Returns:
        Zeros and ones, (out_channels, in_channels or 1, kernel_size, kernel_size).
    """
    centre = kernel_size // 2
    mask = torch.zeros(out_channels, 1 if depthwise else in_channels, kernel_size, kernel_size)
    mask[:, :, :centre] = 1.0
    mask[:, :, centre, :centre] = 1.0
    if reverse:
        mask = mask.flip((2, 3))
    if depthwise:
        mask[:, :, centre, centre] = 0.0 if strict else 1.0
        return mask
    num_blocks = min(out_channels, in_channels)
    out_block = torch.arange(out_channels) // (out_channels // num_blocks)
    in_block = torch.arange(in_channels) // (in_channels // num_blocks)
    seen = in_block < out_block[:, None] if strict else in_block <= out_block[:, None]
    mask[:, :, centre, centre] = seen.float()
    return mask


class AutoregressiveFlow(nn.Module):
    """One step ``z' = z - shift(z)``, where each shift depends only on earlier elements.

    The Jacobian is unit triangular, so the step preserves volume: its log determinant is 0.

    Args:
        channels: Number of latent channels.
        reverse: Whether pixels are ordered from last to first.
    """

    expansion = 6

    def __init__(self, channels: int, *, reverse: bool) -> None:
        super().__init__()
        hidden = self.expansion * channels
        self.expand = MaskedConv2d(
            causal_mask(hidden, channels, 3, strict=True, reverse=reverse),
            channels, hidden, 3, padding=1, bias=False,
        )  # fmt: skip
        self.mix = MaskedConv2d(
            causal_mask(hidden, hidden, 5, strict=False, depthwise=True, reverse=reverse),
            hidden, hidden, 5, padding=2, groups=hidden, bias=False,
        )  # fmt: skip
        self.project = MaskedConv2d(
            causal_mask(channels, hidden, 1, strict=False, reverse=reverse),
            hidden, channels, 1,
        )  # fmt: skip
        with torch.no_grad():
            self.project.log_gain.add_(math.log(0.1))  # starts close to the identity

    def forward(self, z: FeatureMap) -> FeatureMap:
        hidden = F.elu(self.mix(F.elu(self.expand(z))))
        return z - self.project(F.elu(hidden))  # two ELUs in a row, as in the published weights


class FlowPair(nn.Sequential):
    """One step in raster order and one in reverse order: a "flow cell" of Table 6."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            AutoregressiveFlow(channels, reverse=False), AutoregressiveFlow(channels, reverse=True)
        )
