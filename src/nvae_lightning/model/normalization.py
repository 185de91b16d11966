"""Batch normalisation with statistics over the batches of all ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _NormBase

from nvae_lightning.model.shapes import FeatureMap, PerChannel


def num_ranks(group: ProcessGroup | None = None) -> int:
    """Return the number of ranks of a group (None: all), 1 outside distributed training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(group)
    return 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average a tensor over all ranks; no gradient flows through it."""
    value = value.detach()
    if num_ranks() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / num_ranks()


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks that share statistics, with gradients summed over the same ranks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ANN401
        value = value.clone()
        torch.distributed.all_reduce(value, group=BatchNorm.group)
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # noqa: ANN401  # pyright: ignore[reportIncompatibleMethodOverride]
        return _SumOverRanks.apply(grad_output)


class BatchNorm(_NormBase):
    r"""Batch normalisation :math:`\gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta`.

    In training, mean and variance are over the batches of all ranks of `group`, with any backend,
    and the running statistics move by 5 % per step.

    It is not an ``nn.BatchNorm2d``, which ``trainer.sync_batchnorm`` would replace, but has the
    same state dict. ``torch.optim.swa_utils.update_bn`` does not recognise it;
    :func:`nvae_lightning.inference.recalibration.recalibrate` does.

    Source: Vahdat & Kautz 2020, Sec. 3.1.1.

    Args:
        channels: Number of channels of the feature map.

    Attributes:
        group: Ranks that share statistics, the same for all layers; None for all ranks.
        is_repeated: Whether the pass recomputes an earlier one, which has already updated the
            running statistics.

    Raises:
        ValueError: If a training batch has only one value per channel.
    """

    group: ClassVar[ProcessGroup | None] = None

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.05)
        self.is_repeated = False

    def forward(self, input: FeatureMap) -> FeatureMap:
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(input, mean, var, self.weight, self.bias, eps=self.eps)
        running_mean, running_var = self.count_batch(input)
        assert self.momentum is not None
        if num_ranks(self.group) == 1:
            return F.batch_norm(
                input, running_mean, running_var, self.weight, self.bias, True, self.momentum,
                self.eps,
            )  # fmt: skip
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = _SumOverRanks.apply(x.new_tensor(x.numel() // x.shape[1]))
        mean = _SumOverRanks.apply(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        var = _SumOverRanks.apply(centred.square().sum((0, 2, 3))) / count
        moved = ((running_mean, mean), (running_var, var * (count / (count - 1))))
        for running, value in moved:
            running.lerp_(value.detach().to(running.dtype), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    def count_batch(self, input: FeatureMap) -> tuple[PerChannel, PerChannel]:
        """Count a training batch and return the running mean and variance to update.

        Return copies if the batch has already been counted.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        if num_ranks(self.group) == 1 and input.numel() == input.shape[1]:
            raise ValueError(
                "dataset.batch_size: got 1, but a single pixel has no variance for batch "
                "normalisation; set dataset.batch_size=2 or more"
            )
        if self.is_repeated:
            return self.running_mean.clone(), self.running_var.clone()
        self.num_batches_tracked.add_(1)
        return self.running_mean, self.running_var
