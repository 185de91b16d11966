"""Batch normalisation over the batches of all ranks, fused with the swish that follows it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _NormBase

FeatureMap = Float[Tensor, "batch channel height width"]


def num_ranks() -> int:
    """Return the number of processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average a tensor over all ranks; no gradient flows through it."""
    if num_ranks() == 1:
        return value
    value = value.detach().clone()
    torch.distributed.all_reduce(value)
    return value / num_ranks()


class BatchNorm(_NormBase):
    r"""Batch normalisation, and swish :math:`u \sigma(u)` after it if asked for.

    In training, mean and variance are those of the batches of all ranks, on any backend. Of the
    feature maps only the input is kept for the backward pass, which computes the normalised one
    anew: the paper's 18 % of memory.

    Not an ``nn.BatchNorm2d``, which ``trainer.sync_batchnorm`` would replace by a layer without
    the swish; the state dict is that of one.

    Source: Vahdat & Kautz 2020, Sec. 3.1.1 and 3.1.3; running statistics move by 5 % a step.

    Args:
        channels: of the feature map.
        swish: whether to apply swish.

    Raises:
        ValueError: in training, if there is but one value per channel.
    """

    def __init__(self, channels: int, *, swish: bool = False) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.05)
        self.swish = swish

    def forward(self, input: FeatureMap) -> FeatureMap:
        if self.training:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            return _BatchNormSwish.apply(
                input, self.weight, self.bias, self.running_mean, self.running_var,
                self.momentum, self.eps, self.swish,
            )  # fmt: skip
        output = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
        return F.silu(output) if self.swish else output


class _BatchNormSwish(torch.autograd.Function):
    """Normalise by the statistics of the batches of all ranks; swish if asked for."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        swish: bool,
    ) -> Tensor:
        ctx.num_values = x.numel() // x.shape[1]  # per channel, of all ranks
        if num_ranks() == 1:
            if ctx.num_values == 1:
                raise ValueError(
                    "dataset.batch_size: got 1, but batch normalisation of a single pixel has no "
                    "variance; set dataset.batch_size=2 or more"
                )
            output, mean, inverse_std = torch.native_batch_norm(
                x, weight, bias, running_mean, running_var, True, momentum, eps
            )
        else:
            mean, var, ctx.num_values = _statistics(x)
            inverse_std = (var + eps).rsqrt()
            unbiased = var * (ctx.num_values / (ctx.num_values - 1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
            output = _normalize(x, weight, bias, mean, inverse_std, eps)
        ctx.eps, ctx.swish, ctx.synchronized = eps, swish, num_ranks() > 1
        ctx.save_for_backward(x, weight, bias, mean, inverse_std)
        return F.silu(output, inplace=True) if swish else output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] -- of one output
        ctx: Any,  # noqa: ANN401
        gradient: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse_std = ctx.saved_tensors
        if ctx.swish:
            output = _normalize(x, weight, bias, mean, inverse_std, ctx.eps)
            gradient = torch.ops.aten.silu_backward(gradient, output)
        if not ctx.synchronized:
            for_inputs = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, None, None, mean, inverse_std, True, ctx.eps,
                list(ctx.needs_input_grad[:3]),
            )  # fmt: skip
            return *for_inputs, None, None, None, None, None
        statistics = mean.dtype
        by_channel = (slice(None), None, None)
        normalized = (x.to(statistics) - mean[by_channel]) * inverse_std[by_channel]
        gradient = gradient.to(statistics)
        for_weight = (gradient * normalized).sum((0, 2, 3))
        for_bias = gradient.sum((0, 2, 3))
        sums = torch.stack([for_weight, for_bias])
        torch.distributed.all_reduce(sums)
        along_normalized, along_one = (sums / ctx.num_values)[..., None, None]
        for_x = gradient - along_one - normalized * along_normalized
        for_x = for_x * (weight.to(statistics) * inverse_std)[by_channel]
        return (
            for_x.to(x.dtype), for_weight.to(weight.dtype), for_bias.to(bias.dtype),
            None, None, None, None, None,
        )  # fmt: skip


def _statistics(x: FeatureMap) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count per channel over all ranks, whose batches may differ in size."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    count = values.new_full((1,), values.numel() // values.shape[1])
    own = torch.cat([count, mean, var])
    gathered = [torch.empty_like(own) for _ in range(num_ranks())]
    torch.distributed.all_gather(gathered, own)
    every = torch.stack(gathered)
    counts, means, variances = every.split([1, len(mean), len(mean)], 1)
    share = counts / counts.sum()
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, counts.sum()


def _normalize(
    x: FeatureMap, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
) -> FeatureMap:
    return F.batch_norm(x, mean, inverse_std.pow(-2) - eps, weight, bias, eps=eps)
