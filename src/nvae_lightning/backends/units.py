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
        assert isinstance(self.norm, BatchNorm)
        if any(map(has_hooks, self.children())):
            return super().forward(x)
        if self.norm.training:
            return self._train(x, self.norm, self.kernels.on(x.device))
        if torch.is_grad_enabled():
            return super().forward(x)
        return self._infer(x, self.norm, self.kernels.on(x.device))

    @property
    def _swish(self) -> bool:
        return isinstance(self.activation, nn.SiLU)

    def _train(self, x: FeatureMap, norm: BatchNorm, kernels: TorchKernels) -> FeatureMap:
        """Normalise by the batch, and convolve if the backward pass recomputes the activation."""
        convolution = Convolution.of(self.convolution) if self.recomputes_activation else None
        output = normalize(norm, x, kernels, swish=self._swish, convolution=convolution)
        return output if convolution is not None else self.convolution(output)

    def _infer(self, x: FeatureMap, norm: BatchNorm, kernels: TorchKernels) -> FeatureMap:
        """Normalise by running statistics without gradients."""
        a = F.silu(norm(x), inplace=True) if self._swish else norm(x)
        if kernels.depthwise is not None and _is_depthwise(self.convolution):
            convolution = Convolution.of(self.convolution)
            if convolution is not None:
                return convolution.cast(a.device.type).apply(a, kernels.depthwise)
        return self.convolution(a)


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
