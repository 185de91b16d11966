"""Batch normalisation and swish, plain and fused, alone and over two ranks.

As a script, this file runs both ranks: ``test_normalization.py FOLDER``.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn

from nvae_lightning.backends import Compute
from nvae_lightning.model.layers import NormActConv
from nvae_lightning.model.normalization import BatchNorm

SWISH = pytest.mark.parametrize("swish", [False, True])
FUSED = pytest.mark.parametrize("fused", [False, True])
SIZES = (5, 2)  # batch sizes of two ranks


def build(swish: bool, fused: bool) -> tuple[NormActConv, nn.Sequential]:
    """Build our unit and the same from torch's layers, with the same parameters."""
    norm = BatchNorm(3)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    ours = NormActConv(norm, nn.SiLU() if swish else nn.Identity(), nn.Identity())
    if fused:
        Compute(recompute="activation").apply(ours)
    theirs = nn.BatchNorm2d(3, momentum=0.05)
    theirs.load_state_dict(norm.state_dict())
    return ours, nn.Sequential(theirs, nn.SiLU() if swish else nn.Identity())


def batch(num: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch whose mean and variance are far from 0 and 1."""
    return (3 * torch.randn(num, 3, 5, 6, dtype=torch.float64) + 2).to(dtype)


def output_and_gradients(module: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, and gradients for the input and all parameters."""
    x = x.detach().requires_grad_()
    output = module(x)
    gradients = torch.autograd.grad(output, [x, *module.parameters()], upstream)
    return [output.detach(), *gradients]


@FUSED
@SWISH
def test_gradient_agrees_with_finite_differences(swish: bool, fused: bool) -> None:
    ours = build(swish, fused)[0].double()
    norm = ours.norm

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        for name, value in (("weight", weight), ("bias", bias)):
            delattr(norm, name)
            setattr(norm, name, value)  # not a parameter: it would stop the gradient
        return ours(x)

    inputs = [batch(2, torch.float64), norm.weight, norm.bias]
    assert torch.autograd.gradcheck(function, [t.detach().requires_grad_() for t in inputs])


@FUSED
@SWISH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_agrees_with_batch_norm_and_silu_of_torch(
    swish: bool, fused: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    ours, theirs = build(swish, fused)
    ours.to(dtype)
    theirs.to(dtype)
    x = batch(dtype=dtype)
    for _ in range(3):
        x = batch(dtype=dtype).contiguous(memory_format=layout)
        upstream = torch.randn_like(x)
        results = output_and_gradients(ours, x, upstream)
        torch.testing.assert_close(results, output_and_gradients(theirs, x, upstream))
        assert results[0].is_contiguous(memory_format=layout)
        assert results[1].is_contiguous(memory_format=layout)
    torch.testing.assert_close(ours.norm.state_dict(), theirs[0].state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert ours(x).is_contiguous(memory_format=layout)


@FUSED
@SWISH
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_sixteen_bit_error_is_within_rounding(
    swish: bool, fused: bool, weights: torch.dtype
) -> None:
    ours, theirs = build(swish, fused)
    ours.to(weights)
    theirs[0].load_state_dict(ours.norm.state_dict())
    x = batch(dtype=torch.bfloat16)
    upstream = torch.randn_like(x)
    results = output_and_gradients(ours, x, upstream)
    assert [r.dtype for r in results] == [torch.bfloat16] * 2 + [weights] * 2
    expected = output_and_gradients(theirs, x.float(), upstream.float())
    for result, exact in zip(results, expected, strict=True):
        error = (result.float() - exact).abs().max() / exact.abs().max()
        assert error < 0.02
    if weights == torch.float32:
        torch.testing.assert_close(ours.norm.state_dict(), theirs[0].state_dict())


@FUSED
@SWISH
def test_evaluation_has_a_gradient_and_leaves_the_statistics(swish: bool, fused: bool) -> None:
    ours, theirs = build(swish, fused)
    for module in (ours, theirs):
        module(batch())
    theirs[0].load_state_dict(ours.norm.state_dict())
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    x = batch()
    upstream = torch.randn_like(x)
    results = output_and_gradients(ours.eval(), x, upstream)
    torch.testing.assert_close(results, output_and_gradients(theirs.eval(), x, upstream))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@contextmanager
def counting(maps: set[int], size: int) -> Iterator[None]:
    """Collect the addresses of the feature maps kept for the backward pass."""

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == size:
            maps.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    x = batch().requires_grad_()
    for module, expected in zip(build(swish=True, fused=True), (1, 2), strict=True):
        maps: set[int] = set()
        with counting(maps, x.numel()):
            output = module(x)
        assert len(maps) == expected
        assert x.untyped_storage().data_ptr() in maps
        output.sum().backward()


@FUSED
def test_a_single_value_per_channel_is_refused(fused: bool) -> None:
    ours, _ = build(swish=True, fused=fused)
    with pytest.raises(ValueError, match=r"dataset\.batch_size: got 1"):
        ours(torch.randn(1, 3, 1, 1))
    assert torch.equal(ours.norm.running_var, torch.ones(3))  # pyright: ignore


@FUSED
@SWISH
def test_works_on_the_meta_device(swish: bool, fused: bool) -> None:
    with torch.device("meta"):
        ours = build(swish, fused)[0]
        x = torch.empty(2, 3, 4, 4, requires_grad=True)
        output = ours(x)
        output.sum().backward()
    assert output.shape == x.shape
    assert x.grad is not None
    assert ours.eval()(x).shape == x.shape


def test_state_dict_matches_torch() -> None:
    ours, theirs = build(swish=True, fused=True)
    assert list(ours.norm.state_dict()) == list(theirs[0].state_dict())
    assert list(ours.state_dict()) == [f"norm.{name}" for name in theirs[0].state_dict()]
    assert torch.equal(ours.norm.running_var, torch.ones(3))  # pyright: ignore


@pytest.mark.parametrize(
    "convert", [nn.SyncBatchNorm.convert_sync_batchnorm, TorchSyncBatchNorm().apply]
)
@FUSED
def test_conversion_to_sync_batch_norm_skips_our_layers(convert, fused: bool) -> None:
    ours = build(swish=True, fused=fused)[0]
    before = [type(module) for module in ours.modules()]
    converted = convert(nn.Sequential(ours))
    assert isinstance(converted, nn.Sequential)
    assert [type(module) for module in converted[0].modules()] == before


def synchronised(rank: int, swish: bool, fused: bool) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one rank on its part of a batch."""
    torch.manual_seed(1)
    module = build(swish, fused)[0].double()
    x, upstream = (batch(sum(SIZES), torch.float64).split(SIZES)[rank] for _ in range(2))
    output, grad_x, *grad_parameters = output_and_gradients(module, x, upstream)
    for gradient in grad_parameters:  # the loss sums over images, so gradients sum over ranks
        torch.distributed.all_reduce(gradient)
    output_and_gradients(module, x, upstream)
    return {
        "output": output, "grad_x": grad_x, "grad_weight": grad_parameters[0],
        "grad_bias": grad_parameters[1], **module.norm.state_dict(),
    }  # fmt: skip


@FUSED
@SWISH
def test_two_ranks_with_unequal_batches_equal_one(
    written_by_this_file: Path, swish: bool, fused: bool
) -> None:
    folder = written_by_this_file
    first, second = (torch.load(folder / f"{rank}-{swish}-{fused}.pt") for rank in range(2))
    torch.manual_seed(1)
    module = build(swish, fused)[1].double()
    x, upstream = (batch(sum(SIZES), torch.float64) for _ in range(2))
    output, grad_x, grad_weight, grad_bias = output_and_gradients(module, x, upstream)
    output_and_gradients(module, x, upstream)
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([first["output"], second["output"]]), output, **close)
    torch.testing.assert_close(torch.cat([first["grad_x"], second["grad_x"]]), grad_x, **close)
    for rank in (first, second):
        torch.testing.assert_close(rank["grad_weight"], grad_weight, **close)
        torch.testing.assert_close(rank["grad_bias"], grad_bias, **close)
        for name, value in module[0].state_dict().items():
            torch.testing.assert_close(rank[name], value, **close)


@FUSED
@SWISH
def test_nodes_that_share_no_statistics_are_independent(
    written_by_this_file: Path, swish: bool, fused: bool
) -> None:
    for rank in range(2):
        found = torch.load(written_by_this_file / f"{rank}-{swish}-{fused}-node.pt")
        torch.manual_seed(1)
        module = build(swish, fused)[1].double()
        x, upstream = (batch(sum(SIZES), torch.float64).split(SIZES)[rank] for _ in range(2))
        output, grad_x, *_ = output_and_gradients(module, x, upstream)
        close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(found["output"], output, **close)
        torch.testing.assert_close(found["grad_x"], grad_x, **close)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    second = os.fork()
    number = int(second == 0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}/store", rank=number, world_size=2
    )
    for swish, fused in product((False, True), repeat=2):
        torch.save(synchronised(number, swish, fused), place / f"{number}-{swish}-{fused}.pt")
    BatchNorm.group, _ = torch.distributed.new_subgroups(1)  # two nodes of one rank each
    for swish, fused in product((False, True), repeat=2):
        torch.save(synchronised(number, swish, fused), place / f"{number}-{swish}-{fused}-node.pt")
    torch.distributed.destroy_process_group()
    if second:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
