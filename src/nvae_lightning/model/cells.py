"""Residual cells of the paper's Fig. 3, at one resolution or between two."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nvae_lightning.model.convolution import FeatureMap
from nvae_lightning.model.layers import (
    BatchNormSwish,
    ConvolutionalBody,
    SkipDown,
    SkipUp,
    SqueezeExcitation,
    WeightNormConv2d,
    batch_norm,
)
from nvae_lightning.model.normalization import BatchNorm


class Resampling(enum.Enum):
    """What a cell does to the resolution."""

    SAME = enum.auto()
    DOWN = enum.auto()
    UP = enum.auto()


@runtime_checkable
class CellConstructor(Protocol):
    """What the encoder and decoder are given to build their cells with."""

    def __call__(
        self,
        in_channels: int,
        out_channels: int,
        resampling: Resampling = Resampling.SAME,
        *,
        squeeze_excitation: bool = True,
    ) -> nn.Module:
        """Build one cell."""
        ...


class ResidualCell(nn.Module):
    """Residual cell ``skip(x) + 0.1 * gate(body(x))``.

    Args:
        body: what the subclass is about.
        in_channels: channels of the input.
        out_channels: channels of the output.
        resampling: what the cell does to the resolution.
        squeeze_excitation: whether the body's output is gated channel-wise.

    Attributes:
        checkpoint_min_size: width from which on inputs are all that is kept of the cell for the
            backward pass, which computes it anew; None for never.

    Raises:
        ValueError: if the channels change where the resolution does not.
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
                f"a cell at one resolution keeps its channels, got {in_channels} to {out_channels}"
            )
        self.skip = {
            Resampling.SAME: lambda: nn.Identity(),
            Resampling.DOWN: lambda: SkipDown(in_channels, out_channels),
            Resampling.UP: lambda: SkipUp(in_channels, out_channels),
        }[resampling]()
        self.body = body
        self.checkpoint_min_size: int | None = None
        self.gate = SqueezeExcitation(out_channels) if squeeze_excitation else nn.Identity()

    def forward(self, x: FeatureMap) -> FeatureMap:
        least = self.checkpoint_min_size
        if least is None or x.shape[-1] < least or not torch.is_grad_enabled():
            return self._compute(x)
        return checkpoint(
            self._compute,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is drawn in a cell
            context_fn=lambda: (nullcontext(), self._repeated()),
        )

    def _compute(self, x: FeatureMap) -> FeatureMap:
        return self.skip(x) + self.residual_weight * self.gate(self.body(x))

    @contextmanager
    def _repeated(self) -> Iterator[None]:
        """Let no batch count twice in running statistics."""
        norms = [module for module in self.modules() if isinstance(module, BatchNorm)]
        for norm in norms:
            norm.is_repeated = True
        try:
            yield
        finally:
            for norm in norms:
                norm.is_repeated = False


class RegularCell(ResidualCell):
    """Encoder cell: normalisation-activation-convolution, twice.

    Source: paper, Fig. 3b.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        resampling: what the first convolution does to the resolution.
        squeeze_excitation: whether the cell ends in a channel-wise gate.
        dilations: dilation of each 3x3 convolution; one entry, one convolution.
        normalization: constructor of normalisation and activation, given the channels.
        convolution: constructor of the convolutions, with ``nn.Conv2d``'s arguments.

    Raises:
        ValueError: if there is no dilation, or one is below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resampling: Resampling = Resampling.SAME,
        *,
        squeeze_excitation: bool = True,
        dilations: Sequence[int] = (1, 1),
        normalization: Callable[[int], nn.Module] = BatchNormSwish,
        convolution: Callable[..., nn.Module] = WeightNormConv2d,
    ) -> None:
        if not dilations or min(dilations) < 1:
            raise ValueError(
                "dilations must be one whole number of at least 1 for every convolution, "
                f"got {list(dilations)}: [1, 1] is the paper's"
            )
        layers: list[nn.Module] = []
        channels, step = in_channels, resampling
        for dilation in dilations:
            layers.append(normalization(channels))
            if step is Resampling.UP:
                layers.append(nn.UpsamplingNearest2d(scale_factor=2))
            stride = 2 if step is Resampling.DOWN else 1
            layers.append(
                convolution(
                    channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation
                )
            )
            channels, step = out_channels, Resampling.SAME
        body = ConvolutionalBody(*layers)
        super().__init__(body, in_channels, out_channels, resampling, squeeze_excitation)


class DepthwiseCell(ResidualCell):
    """Decoder cell: expand by 1x1, depthwise k x k, project by 1x1, normalised throughout.

    Source: paper, Fig. 3a (MobileNetV2's inverted residual with a normalisation at each end).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        resampling: what the depthwise convolution (or, going up, a step before it) does.
        squeeze_excitation: whether the cell ends in a channel-wise gate.
        expansion: hidden channels over input channels.
        kernel_size: side of the depthwise kernel, odd.
        num_groups: groups of the middle convolution; None is depthwise.

    Raises:
        ValueError: if the kernel's side is even, nothing is left of the hidden channels, or
            they cannot be parted into the groups.
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
            raise ValueError(
                f"kernel_size must be odd to keep the resolution, and positive, got {kernel_size}"
            )
        hidden = round(in_channels * expansion)
        if hidden < 1:
            raise ValueError(
                f"expansion must leave at least 1 of {in_channels} channels, got {expansion}"
            )
        if num_groups is not None and (num_groups < 1 or hidden % num_groups):
            raise ValueError(
                f"num_groups of a cell must divide its {hidden} hidden channels, got "
                f"{num_groups}: null is depthwise"
            )
        layers: list[nn.Module] = [
            batch_norm(in_channels),
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            BatchNormSwish(hidden),
            nn.Conv2d(
                hidden,
                hidden,
                kernel_size,
                stride=2 if resampling is Resampling.DOWN else 1,
                padding=kernel_size // 2,
                groups=hidden if num_groups is None else num_groups,
                bias=False,
            ),
            BatchNormSwish(hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            batch_norm(out_channels),
        ]
        if resampling is Resampling.UP:
            layers.insert(0, nn.UpsamplingNearest2d(scale_factor=2))
        body = ConvolutionalBody(*layers)
        super().__init__(body, in_channels, out_channels, resampling, squeeze_excitation)
