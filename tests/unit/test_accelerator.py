"""Sampling and the loss never wait for a CUDA device.

Fake tensors claim to be on one: they have shapes and a device, but no values to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvae_lightning.model import NVAE
from nvae_lightning.objective import (
    SpectralPenalty,
    balance_kl,
    bn_scale_penalty,
    elbo,
)


class _HostTensors(TorchDispatchMode):
    """Record operations that read or write tensors of the host.

    A copy from the host synchronises with the device and cannot be part of a CUDA graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        output = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, output)) if isinstance(t, Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(str(func))
        return output


@pytest.fixture
def pretended(flow_nvae: NVAE) -> Iterator[NVAE]:
    """A model that seems to be on a CUDA device, where reading a value is an error."""
    nvae = flow_nvae

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    with FakeTensorMode():
        try:
            empty(torch.ones(1, 2, 2, 2)).contiguous(memory_format=torch.channels_last)
        except RuntimeError:  # older versions abort some operations
            pytest.skip("this version of torch cannot pretend without a CUDA device")
        for module in nvae.modules():
            for name, weight in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(empty(weight)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, empty(buffer))
        yield nvae


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Results of torch.batch_norm_stats by shape only, which torch lacks without a device."""
    return x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def test_sampling_never_waits(pretended: NVAE) -> None:
    pretended.eval()
    with _HostTensors() as seen:
        images = pretended.sample(4, 0.7).mean
    assert (images.device.type, len(images)) == ("cuda", 4)
    assert seen.found == []


@pytest.mark.parametrize("is_number", [True, False])
def test_the_loss_never_waits(
    is_number: bool, pretended: NVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "batch_norm_stats", _statistics)
    pretended.train()
    image = pretended.image
    penalty = SpectralPenalty(pretended)
    penalty.converged = True
    factor = torch.empty(pretended.hierarchy.num_groups, device="cuda")
    x = torch.empty(4, image.channels, image.size, image.size, device="cuda")
    beta = 0.5 if is_number else torch.empty((), device="cuda")
    with _HostTensors() as seen:
        terms = elbo(pretended.infer(x), x)  # training checks the values of its first batch only
        loss = (terms.distortion + balance_kl(terms.rate, factor, beta)).mean()
        loss = loss + penalty() + bn_scale_penalty(pretended)
    assert loss.device.type == "cuda"
    assert seen.found == []
