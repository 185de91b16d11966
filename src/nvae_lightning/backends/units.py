"""Layers that :class:`Compute` puts in place of the plain ones of ``model/``.

Each is a subclass of the layer that it replaces, with the same parameters. Layers with hooks keep
their plain forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nvae_lightning.backends.convolution import Convolution
from nvae_lightning.backends.kernels import TorchKernels, normalize
from nvae_lightning.model.cells import ResidualCell
from nvae_lightning.model.layers import NormActConv
from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.model.shapes import FeatureMap, PerChannel

#: A layer, an operation or a convolution with folded weights.
Step = Callable[[FeatureMap], FeatureMap] | Convolution

#: Size of a cell's widest feature map beyond which a batch is processed in parts. On a CPU with
#: 32 MiB of L3 cache, 4 to 8 MiB are the fastest of 1 to 16.
_CACHED_BYTES = 1 << 23
_IMAGEWISE = (nn.UpsamplingNearest2d, nn.SiLU, nn.ELU)


class FusedBatchNorm(BatchNorm):
    """Batch normalisation that keeps only its input for the backward pass.

    Attributes:
        kernels: Implementation in training.
    """

    kernels: TorchKernels

    def forward(self, input: FeatureMap) -> FeatureMap:
        if not self.training:
            return super().forward(input)
        return normalize(self, input, self.kernels)


class FusedUnit(NormActConv):
    """Unit of batch normalisation, optional swish and convolution.

    In training the backward pass recomputes the normalisation and, on request, the activation,
    which is the input of the convolution.

    Attributes:
        kernels: Implementation.
        recomputes_activation: Whether the convolution is part of the fused function.
    """

    kernels: TorchKernels
    recomputes_activation: bool

    @staticmethod
    def supports(unit: NormActConv) -> bool:
        """Whether the layers of a unit can be fused."""
        return type(unit.norm) in (BatchNorm, FusedBatchNorm) and type(unit.activation) in (
            nn.SiLU,
            nn.Identity,
        )

    def forward(self, x: FeatureMap) -> FeatureMap:
        norm, swish = self.norm, isinstance(self.activation, nn.SiLU)
        assert isinstance(norm, BatchNorm)
        if any(map(_has_hooks, self.children())):
            return super().forward(x)
        if norm.training:
            fused = Convolution.of(self.convolution) if self.recomputes_activation else None
            output = normalize(norm, x, self.kernels, swish=swish, convolution=fused)
            return output if fused is not None else self.convolution(output)
        if torch.is_grad_enabled():
            return super().forward(x)
        a = F.silu(norm(x), inplace=True) if swish else norm(x)
        depthwise, layer = self.kernels.depthwise, self.convolution
        if depthwise is not None and isinstance(layer, nn.Conv2d) and layer.groups > 1:
            if (convolution := Convolution.of(layer)) is not None:
                return convolution.cast(a.device.type).apply(a, depthwise)
        return layer(a)


class FoldingSequential(nn.Sequential):
    """Body of a cell that folds normalisations into convolutions, without gradients on a CPU.

    Layers that treat each pixel alone run before an upsampling instead of after it. A batch whose
    feature maps exceed the caches is processed in parts.
    """

    def forward(self, input: FeatureMap) -> FeatureMap:
        if input.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(input)
        steps = self._steps()
        parts = [_run(steps, part) for part in input.split(_images_at_once(steps, input))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _steps(self) -> list[Step]:
        """List the layers, with folded convolutions in place of those that fold."""
        steps: list[Step] = []
        upsampling: list[nn.Module] = []  # waits until a layer depends on it
        for layer in _layers(self):
            if type(layer) is nn.UpsamplingNearest2d and not _has_hooks(layer):
                upsampling.append(layer)
                continue
            if not _is_pixelwise(layer):
                steps += upsampling
                upsampling = []
            last = steps[-1] if steps else None
            if isinstance(last, Convolution) and _is_foldable(layer):
                steps[-1] = last.followed_by(*_as_affine(layer))
            elif type(layer) is nn.SiLU and not _has_hooks(layer) and _is_fresh(last):
                steps.append(partial(F.silu, inplace=True))
            elif _has_hooks(layer) or (convolution := Convolution.of(layer)) is None:
                steps.append(layer)
            elif _is_foldable(last) and convolution.is_pointwise:
                steps[-1] = convolution.behind(*_as_affine(last))
            else:
                steps.append(convolution)
        return steps + upsampling


def _run(steps: Iterable[Step], x: FeatureMap) -> FeatureMap:
    for step in steps:
        x = step.apply(x) if isinstance(step, Convolution) else step(x)
    return x


def _images_at_once(steps: Sequence[Step], x: FeatureMap) -> int:
    """Return how many images of a batch should be processed at once.

    All, if a step may depend on the rest of the batch or be observed, or if they are few.
    """
    if torch.compiler.is_compiling() or not all(map(_is_imagewise, steps)):
        return len(x)
    channels = max(
        (len(step.kernel) for step in steps if isinstance(step, Convolution)), default=1
    )
    pixels = 4 if any(isinstance(step, nn.UpsamplingNearest2d) for step in steps) else 1
    num_bytes = channels * pixels * x[:, 0].nbytes
    num_parts = math.ceil(num_bytes / _CACHED_BYTES)
    return math.ceil(len(x) / max(num_parts, 1))


def _is_imagewise(step: Step) -> bool:
    """Whether a step treats each image alone and has no hooks."""
    if isinstance(step, nn.Module):
        return _is_foldable(step) or (type(step) in _IMAGEWISE and not _has_hooks(step))
    return True


def _layers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """List the layers of units and sequences; containers with hooks stay whole."""
    layers: list[nn.Module] = []
    for module in modules:
        is_open = type(module) in (NormActConv, FusedUnit, nn.Sequential)
        if is_open and not _has_hooks(module):
            layers += _layers(module.children())
        elif type(module) is not nn.Identity or _has_hooks(module):
            layers.append(module)
    return layers


def _is_pixelwise(layer: nn.Module) -> bool:
    """Whether the output at a pixel depends on the input at this pixel alone."""
    if _is_foldable(layer) or (type(layer) is nn.SiLU and not _has_hooks(layer)):
        return True
    convolution = None if _has_hooks(layer) else Convolution.of(layer)
    if convolution is None or not convolution.is_pointwise:
        return False
    return convolution.geometry.stride == (1, 1)


def _is_foldable(layer: object) -> TypeGuard[BatchNorm]:
    """Whether a layer normalises with running statistics."""
    if not isinstance(layer, BatchNorm) or type(layer) not in (BatchNorm, FusedBatchNorm):
        return False
    return not layer.training and not _has_hooks(layer)


def _is_fresh(step: object) -> bool:
    """Whether nothing else refers to the output of a step."""
    return isinstance(step, Convolution) or (isinstance(step, BatchNorm) and not _has_hooks(step))


def _as_affine(norm: BatchNorm) -> tuple[PerChannel, PerChannel]:
    r"""Return scale :math:`s` and shift :math:`t` of a normalisation with running statistics.

    .. math:: s = \gamma / \sqrt{v + \epsilon}, \quad t = \beta - s m

    with the running mean m and variance v.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - scale * norm.running_mean


def _has_hooks(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def recomputed(cell: ResidualCell, min_size: int, x: FeatureMap) -> FeatureMap:
    """Run the forward pass of a cell, which the backward pass recomputes from its input.

    Args:
        cell: Cell.
        min_size: Smallest width of the input for which the cell is recomputed.
        x: Input.
    """
    if x.shape[-1] < min_size or not torch.is_grad_enabled():
        return type(cell).forward(cell, x)
    return checkpoint(
        type(cell).forward,
        cell,
        x,
        use_reentrant=False,
        preserve_rng_state=False,  # cells draw no random numbers
        context_fn=lambda: (nullcontext(), _repeated(cell)),
    )


@contextmanager
def _repeated(cell: ResidualCell) -> Iterator[None]:
    """Keep the recomputation from updating running statistics a second time."""
    norms = [module for module in cell.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.is_repeated = True
    try:
        yield
    finally:
        for norm in norms:
            norm.is_repeated = False
