"""What an accelerator is given, seen with and without one.

Without one, tensors pretend to lie on a CUDA device: shapes and devices are true, numbers none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvae_lightning.backends import GraphedSampler
from nvae_lightning.model import NVAE
from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.objective import (
    SpectralPenalty,
    balance_kl,
    bn_scale_penalty,
    elbo,
)

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a CUDA device")


class _HostTensors(TorchDispatchMode):
    """Keeps the names of operations that read or write tensors of the host.

    A copy from the host makes a device wait, and cannot be part of a CUDA graph.
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
def pretended(nvae: NVAE) -> Iterator[NVAE]:
    """A model that seems to be on a CUDA device, where asking for a number is an error."""

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    with FakeTensorMode():
        try:
            empty(torch.ones(1, 2, 2, 2)).contiguous(memory_format=torch.channels_last)
        except RuntimeError:  # of older versions, which some operations abort, too
            pytest.skip("this version of torch cannot pretend without a CUDA device")
        for module in nvae.modules():
            for name, weight in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(empty(weight)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, empty(buffer))
        yield nvae


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As of torch.batch_norm_stats, whose shapes torch does not know without a device."""
    return x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x + torch.tensor(2.0).to(x.device),
        lambda x: x.cpu(),
    ],
)
def test_waiting_for_a_device_is_noticed(waits: Callable[[Tensor], object]) -> None:
    with FakeTensorMode(), _HostTensors() as seen:
        x = torch.empty(3, device="cuda")
        try:
            waits(x)
        except DataDependentOutputException:
            return
    assert seen.found


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
        terms = elbo(pretended.infer(x), x)  # a training checks its first batch only
        loss = (terms.distortion + balance_kl(terms.rate, factor, beta)).mean()
        loss = loss + penalty() + bn_scale_penalty(pretended)
    assert loss.device.type == "cuda"
    assert seen.found == []


def test_a_graph_takes_a_cuda_device(colour_nvae: NVAE) -> None:
    with pytest.raises(ValueError, match="cuda_graphs: got true, but the model is on 'cpu'"):
        GraphedSampler(colour_nvae.eval(), 4)


def test_a_graph_takes_a_model_in_evaluation_mode(pretended: NVAE) -> None:
    next(m for m in pretended.eval().modules() if isinstance(m, BatchNorm)).train()
    with pytest.raises(ValueError, match="model is in training mode"):
        GraphedSampler(pretended, 4)


@on_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_graph_draws_what_the_model_draws(nvae: NVAE, dtype: torch.dtype | None) -> None:
    nvae.cuda().eval()
    graphed = GraphedSampler(nvae, 4, 0.7)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        torch.manual_seed(3)
        expected = [nvae.sample(4, 0.7).mean for _ in range(3)]
        torch.manual_seed(3)
        found = [graphed() for _ in range(3)]
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found[0], found[1])


@on_gpu
def test_a_graph_sees_what_is_changed_in_place(nvae: NVAE) -> None:
    nvae.cuda().eval()
    graphed = GraphedSampler(nvae, 4)
    torch.manual_seed(3)
    before = graphed()
    for module in nvae.decoder.modules():
        if isinstance(module, BatchNorm):
            module.get_buffer("running_mean").add_(0.5)
    torch.manual_seed(3)
    expected = nvae.sample(4).mean
    torch.manual_seed(3)
    torch.testing.assert_close(graphed(), expected)
    assert not torch.allclose(before, expected)
