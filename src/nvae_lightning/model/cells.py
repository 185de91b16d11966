"""Residual cells of the paper's Fig. 3, which keep or change the resolution."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from nvae_lightning.model.layers import (
    NormActConv,
    SkipDown,
    SkipUp,
    SqueezeExcitation,
    WeightNormConv2d,
)
from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.model.shapes import FeatureMap


class Resampling(enum.Enum):
    """Change of resolution in a cell."""

    SAME = enum.auto()
    DOWN = enum.auto()
    UP = enum.auto()


#: Called as ``cell(in_channels, out_channels, resampling, squeeze_excitation=...)``.
CellConstructor = Callable[..., nn.Module]


class ResidualCell(nn.Module):
    """Residual cell ``skip(x) + 0.1 * gate(body(x))``.

    Args:
        body: Layers of the subclass in sequence.
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        resampling: Change of resolution.
        squeeze_excitation: Whether to gate the body's output channel-wise.

    Raises:
        ValueError: If the channels change but the resolution does not.
    """

    residual_weight = 0.1

    def __init__(
        self,
        body: nn.Module,
        in_channels: int,
        out_channels: int,
        resampling: Resampling,
        squeeze_excitation: bool,
    ) -> None:
        super().__init__()
        if resampling is Resampling.SAME and in_channels != out_channels:
            raise ValueError(
                "in_channels and out_channels must be equal in a cell that keeps the resolution, "
                f"got {in_channels} and {out_channels}"
            )
        self.skip = {
            Resampling.SAME: lambda: nn.Identity(),
            Resampling.DOWN: lambda: SkipDown(in_channels, out_channels),
            Resampling.UP: lambda: SkipUp(in_channels, out_channels),
        }[resampling]()
        self.body = body
        self.gate = SqueezeExcitation(out_channels) if squeeze_excitation else nn.Identity()

    def forward(self, x: FeatureMap) -> FeatureMap:
        return self.skip(x) + self.residual_weight * self.gate(self.body(x))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        from nvae_lightning.serialization.earlier_names import rename_weights

        rename_weights(self.body, state_dict, f"{prefix}body.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class RegularCell(ResidualCell):
    """Encoder cell: two units of normalisation, activation and 3x3 convolution.

    Source: paper, Fig. 3b; Table 2 for other normalisations and activations.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        resampling: Change of resolution, in the first convolution.
        squeeze_excitation: Whether the cell ends in a channel-wise gate.
        dilations: Dilation of each unit's convolution, one entry per unit.
        normalization: Constructor of the normalisations, given the number of channels.
        activation: Constructor of the activations.
        convolution: Constructor of the convolutions, with ``nn.Conv2d``'s arguments.

    Raises:
        ValueError: If ``dilations`` is empty, or a dilation is below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resampling: Resampling = Resampling.SAME,
        *,
        squeeze_excitation: bool = True,
        dilations: Sequence[int] = (1, 1),
        normalization: Callable[[int], nn.Module] = BatchNorm,
        activation: Callable[[], nn.Module] = nn.SiLU,
        convolution: Callable[..., nn.Module] = WeightNormConv2d,
    ) -> None:
        if not dilations or min(dilations) < 1:
            raise ValueError(
                "dilations must list an integer of at least 1 per convolution, "
                f"got {list(dilations)}; the paper's cell has [1, 1]"
            )
        units: list[nn.Module] = []
        channels, step = in_channels, resampling
        for dilation in dilations:
            norm = normalization(channels)
            layer = convolution(
                channels, out_channels, 3, stride=2 if step is Resampling.DOWN else 1,
                padding=dilation, dilation=dilation,
            )  # fmt: skip
            if step is Resampling.UP:
                layer = nn.Sequential(nn.UpsamplingNearest2d(scale_factor=2), layer)
            units.append(NormActConv(norm, activation(), layer))
            channels, step = out_channels, Resampling.SAME
        body = nn.Sequential(*units)
        super().__init__(body, in_channels, out_channels, resampling, squeeze_excitation)


class DepthwiseCell(ResidualCell):
    """Decoder cell: three units that expand by 1x1, filter depthwise and project by 1x1.

    A last batch normalisation, without a convolution, follows them.

    Source: paper, Fig. 3a (MobileNetV2's inverted residual with a normalisation at each end).

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        resampling: Change of resolution: down in the depthwise convolution, up before all units.
        squeeze_excitation: Whether the cell ends in a channel-wise gate.
        expansion: Ratio of hidden to input channels.
        kernel_size: Size of the depthwise kernel, odd.
        num_groups: Groups of the middle convolution; None for depthwise.

    Raises:
        ValueError: If the kernel size is even, there are no hidden channels, or ``num_groups``
            does not divide them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resampling: Resampling = Resampling.SAME,
        *,
        squeeze_excitation: bool = True,
        expansion: int | float = 6,
        kernel_size: int = 5,
        num_groups: int | None = None,
    ) -> None:
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        hidden = round(in_channels * expansion)
        if hidden < 1:
            raise ValueError(
                f"expansion of {in_channels} channels must leave at least 1, got {expansion}"
            )
        if num_groups is not None and (num_groups < 1 or hidden % num_groups):
            raise ValueError(
                f"num_groups of a cell must divide its {hidden} hidden channels, got "
                f"{num_groups}; null means depthwise"
            )
        expand = nn.Conv2d(in_channels, hidden, 1, bias=False)
        filter_ = nn.Conv2d(
            hidden,
            hidden,
            kernel_size,
            stride=2 if resampling is Resampling.DOWN else 1,
            padding=kernel_size // 2,
            groups=hidden if num_groups is None else num_groups,
            bias=False,
        )
        project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        layers = [
            NormActConv(BatchNorm(in_channels), nn.Identity(), expand),
            NormActConv(BatchNorm(hidden), nn.SiLU(), filter_),
            NormActConv(BatchNorm(hidden), nn.SiLU(), project),
            BatchNorm(out_channels),
        ]
        if resampling is Resampling.UP:
            layers.insert(0, nn.UpsamplingNearest2d(scale_factor=2))
        body = nn.Sequential(*layers)
        super().__init__(body, in_channels, out_channels, resampling, squeeze_excitation)
