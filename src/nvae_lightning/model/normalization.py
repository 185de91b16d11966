"""Batch normalisation over all ranks' batches, fused with the swish and convolution after it."""

from __future__ import annotations

import enum
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _NormBase

from nvae_lightning.model.convolution import Convolution, FeatureMap, Geometry, PerChannel
from nvae_lightning.model.fused import Affine, TorchKernels


class Recompute(enum.Enum):
    """What the backward pass of a normalisation computes anew, to keep fewer feature maps."""

    NOTHING = "nothing"  #: all is kept that PyTorch's layers keep
    NORMALIZATION = "normalization"  #: what swish is applied to (the paper)
    ACTIVATION = "activation"  #: also what the convolution behind it is applied to


def num_ranks() -> int:
    """Return the number of processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average a tensor over all ranks; no gradient flows through it."""
    value = value.detach()
    if num_ranks() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / num_ranks()


class BatchNorm(_NormBase):
    r"""Batch normalisation, and swish :math:`u \sigma(u)` after it if asked for.

    In training, mean and variance are those of the batches of all ranks, on any backend.

    Not an ``nn.BatchNorm2d``, which ``trainer.sync_batchnorm`` would replace by a layer without
    the swish; the state dict is that of one. Nor does ``torch.optim.swa_utils.update_bn`` know it;
    :func:`nvae_lightning.sampling.recalibrate` does.

    Source: Vahdat & Kautz 2020, Sec. 3.1.1 and 3.1.3; running statistics move by 5 % a step.

    Args:
        channels: of the feature map.
        swish: whether to apply swish.

    Attributes:
        recompute: what the backward pass computes anew rather than keeping it.
        kernels: how it is computed where something is recomputed, or there are several ranks.
        is_repeated: whether a pass repeats an earlier one, whose statistics have been counted.

    Raises:
        ValueError: in training, if there is but one value per channel.
    """

    def __init__(self, channels: int, *, swish: bool = False) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.05)
        self.swish = swish
        self.recompute = Recompute.ACTIVATION
        self.kernels = TorchKernels()
        self.is_repeated = False

    def forward(
        self, input: FeatureMap, convolution: Convolution | None = None
    ) -> Float[Tensor, "batch _out _out_height _out_width"]:
        """Normalise, and convolve if there is a convolution.

        Args:
            input: feature map.
            convolution: what follows, whose input is then not kept for the backward pass.
        """
        if convolution is not None and (
            not self.training or self.recompute is not Recompute.ACTIVATION
        ):
            if torch.is_grad_enabled():
                return convolution.apply(self.forward(input))
            convolution = convolution.cast(input.device.type)
            return convolution.apply(self.forward(input), self.kernels.on(input.device).depthwise)
        running_mean, running_var = self.running_mean, self.running_var
        assert running_mean is not None
        assert running_var is not None
        if not self.training:
            output = F.batch_norm(
                input, running_mean, running_var, self.weight, self.bias, eps=self.eps
            )
            return F.silu(output, inplace=not output.requires_grad) if self.swish else output
        if num_ranks() == 1 and input.numel() == input.shape[1]:
            raise ValueError(
                "dataset.batch_size: got 1, but batch normalisation of a single pixel has no "
                "variance; set dataset.batch_size=2 or more"
            )
        if self.is_repeated:
            running_mean, running_var = running_mean.clone(), running_var.clone()
        else:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        if self.recompute is Recompute.NOTHING and num_ranks() == 1:
            assert self.momentum is not None
            output = F.batch_norm(
                input, running_mean, running_var, self.weight, self.bias, True, self.momentum,
                self.eps,
            )  # fmt: skip
            return F.silu(output) if self.swish else output
        kernel = bias = geometry = None
        if convolution is not None:
            convolution = convolution.cast(input.device.type)
            kernel, bias, geometry = convolution.kernel, convolution.bias, convolution.geometry
        return _NormalizeAndConvolve.apply(
            input, self.weight, self.bias, kernel, bias, running_mean, running_var,
            (self.momentum, self.eps, self.swish), geometry, self.kernels.on(input.device),
        )  # fmt: skip

    def as_affine(self) -> tuple[PerChannel, PerChannel]:
        r"""Scale :math:`s` and shift :math:`t` of what it does in evaluation, before any swish.

        .. math:: s = \gamma / \sqrt{v + \epsilon}, \quad t = \beta - s m

        with the running mean m and variance v.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - scale * self.running_mean


class _NormalizeAndConvolve(torch.autograd.Function):
    """Normalise by the statistics of all ranks' batches; swish and convolve if asked for.

    Of the feature maps only the input is kept for the backward pass, which computes the others
    anew. That is the paper's trick (Sec. 3.1.3), and here the convolution's input is another map
    not to keep.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        kernel: Tensor | None,
        kernel_bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        settings: tuple[float, float, bool],
        geometry: Geometry | None,
        kernels: TorchKernels,
    ) -> Tensor:
        momentum, eps, swish = settings
        mean, var = kernels.statistics(x)
        num_values: int | Tensor = x.numel() // x.shape[1]  # per channel
        if num_ranks() > 1:
            mean, var, num_values = _over_ranks(mean, var, num_values)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        unbiased = var * (num_values / (num_values - 1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        affine = Affine(mean, (var + eps).rsqrt(), weight.to(mean.dtype), bias.to(mean.dtype))
        ctx.save_for_backward(x, *affine, kernel, kernel_bias)
        ctx.num_values, ctx.swish, ctx.geometry, ctx.kernels = num_values, swish, geometry, kernels
        if kernel is None:
            return kernels.normalize(x, affine, swish)
        assert geometry is not None
        return kernels.convolve(x, affine, swish, Convolution(kernel, kernel_bias, geometry))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] -- of one output
        ctx: Any,  # noqa: ANN401
        gradient: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, *affine, kernel, kernel_bias = ctx.saved_tensors

        def share(sums: Tensor) -> Tensor:
            if num_ranks() > 1:
                sums = sums.clone()
                torch.distributed.all_reduce(sums)
            return sums / ctx.num_values

        if kernel is None:
            found = ctx.kernels.normalize_gradients(gradient, x, Affine(*affine), ctx.swish, share)
            return *found, *(None,) * 7
        found = ctx.kernels.convolve_gradients(
            gradient, x, Affine(*affine), ctx.swish,
            Convolution(kernel, kernel_bias, ctx.geometry), share,
        )  # fmt: skip
        return *found, *(None,) * 5


def _over_ranks(mean: Tensor, var: Tensor, num_values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count per channel over all ranks, whose batches may differ in size."""
    own = torch.cat([mean.new_full((1,), num_values), mean, var])
    gathered = [torch.empty_like(own) for _ in range(num_ranks())]
    torch.distributed.all_gather(gathered, own)
    every = torch.stack(gathered)
    counts, means, variances = every.split([1, len(mean), len(mean)], 1)
    share = counts / counts.sum()
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, counts.sum()
