"""Batch normalisations folded into the convolutions beside them, for inference on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from nvae_lightning.backends.convolution import Convolution
from nvae_lightning.backends.units import FusedBatchNorm, FusedUnit, has_hooks
from nvae_lightning.model.layers import NormActConv
from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.model.shapes import FeatureMap, PerChannel


class FoldingSequential(nn.Sequential):
    """Body of a cell that folds its normalisations where no gradients are computed on a CPU.

    That gives a fifth more samples a second, compiled or not. Layers with hooks are called.
    """

    def forward(self, input: FeatureMap) -> FeatureMap:
        if input.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(input)
        for step in self._steps():
            input = step(input)
        return input

    def _steps(self) -> list[Callable[[FeatureMap], FeatureMap]]:
        """Return the layers, with convolutions in place of those that have been folded."""
        steps: list[Callable[[FeatureMap], FeatureMap] | Convolution] = []
        for layer in _layers(self):
            last = steps[-1] if steps else None
            if isinstance(last, Convolution) and _is_foldable(layer):
                steps[-1] = last.followed_by(*_as_affine(layer))
            elif type(layer) is nn.SiLU and not has_hooks(layer) and _is_fresh(last):
                steps.append(partial(F.silu, inplace=True))
            elif has_hooks(layer) or (convolution := Convolution.of(layer)) is None:
                steps.append(layer)
            elif _is_foldable(last) and convolution.is_pointwise:
                steps[-1] = convolution.behind(*_as_affine(last))
            else:
                steps.append(convolution)
        return [step.apply if isinstance(step, Convolution) else step for step in steps]


def _layers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """List the layers of units and sequences one by one; those that have hooks are left whole."""
    layers: list[nn.Module] = []
    for module in modules:
        is_open = type(module) in (NormActConv, FusedUnit, nn.Sequential)
        if is_open and not has_hooks(module):
            layers += _layers(module.children())
        elif type(module) is not nn.Identity or has_hooks(module):
            layers.append(module)
    return layers


def _is_foldable(layer: object) -> TypeGuard[BatchNorm]:
    """Whether it is a normalisation by running statistics."""
    if not isinstance(layer, BatchNorm) or type(layer) not in (BatchNorm, FusedBatchNorm):
        return False
    return not layer.training and not has_hooks(layer)


def _is_fresh(step: object) -> bool:
    """Whether nothing else refers to the output of a step."""
    return isinstance(step, Convolution) or (isinstance(step, BatchNorm) and not has_hooks(step))


def _as_affine(norm: BatchNorm) -> tuple[PerChannel, PerChannel]:
    r"""Return scale :math:`s` and shift :math:`t` of a normalisation by running statistics.

    .. math:: s = \gamma / \sqrt{v + \epsilon}, \quad t = \beta - s m

    with the running mean m and variance v.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - scale * norm.running_mean
