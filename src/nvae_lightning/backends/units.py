"""Units whose normalisation, activation and convolution are computed together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nvae_lightning.backends.convolution import Convolution
from nvae_lightning.backends.fused import normalize
from nvae_lightning.backends.kernels import TorchKernels
from nvae_lightning.model.layers import NormActConv
from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.model.shapes import FeatureMap


class FusedBatchNorm(BatchNorm):
    """Batch normalisation that keeps only its input for the backward pass.

    Attributes:
        kernels: Implementation in training.
    """

    kernels: TorchKernels

    def forward(self, input: FeatureMap) -> FeatureMap:
        if not self.training:
            return super().forward(input)
        return normalize(self, input, self.kernels.on(input.device))


class FusedUnit(NormActConv):
    """Unit of batch normalisation and, with swish or without, a convolution.

    In training the backward pass recomputes the normalisation and, on request, the activation,
    which is the convolution's input. A unit with hooks on its layers runs its plain forward pass.

    Attributes:
        kernels: Implementation.
        recomputes_activation: Whether the convolution is part of what is computed together.
    """

    kernels: TorchKernels
    recomputes_activation: bool

    @staticmethod
    def supports(unit: NormActConv) -> bool:
        """Whether a unit consists of layers that can be computed together."""
        return type(unit.norm) in (BatchNorm, FusedBatchNorm) and type(unit.activation) in (
            nn.SiLU,
            nn.Identity,
        )

    def forward(self, x: FeatureMap) -> FeatureMap:
        norm, layer, is_training = self.norm, self.convolution, self.norm.training
        if any(map(has_hooks, self.children())) or (not is_training and torch.is_grad_enabled()):
            return super().forward(x)
        assert isinstance(norm, BatchNorm)
        kernels, swish = self.kernels.on(x.device), isinstance(self.activation, nn.SiLU)
        if not is_training:
            a = F.silu(norm(x), inplace=True) if swish else norm(x)
            if kernels.depthwise is not None and _is_depthwise(layer):
                convolution = Convolution.of(layer)
                if convolution is not None:
                    return convolution.cast(a.device.type).apply(a, kernels.depthwise)
            return layer(a)
        if self.recomputes_activation:
            convolution = Convolution.of(layer)
            if convolution is not None:
                return normalize(norm, x, kernels, swish=swish, convolution=convolution)
        return layer(normalize(norm, x, kernels, swish=swish))


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def has_hooks(layer: nn.Module) -> bool:
    """Whether hooks have been registered on a layer."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )
