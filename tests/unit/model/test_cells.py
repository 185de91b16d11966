import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from nvae_lightning.model import DepthwiseCell, RegularCell, Resampling
from nvae_lightning.model.layers import BatchNormELU, DataDependentConv2d, ELUOnly
from nvae_lightning.model.normalization import BatchNorm

CELLS = {
    "regular": RegularCell,
    "dilated": partial(RegularCell, dilations=(2, 1)),
    "one dilated": partial(RegularCell, dilations=(4,)),
    "batch-norm ELU": partial(RegularCell, normalization=BatchNormELU),
    "weight-norm ELU": partial(
        RegularCell, normalization=ELUOnly, convolution=DataDependentConv2d
    ),
    "depthwise": partial(DepthwiseCell, expansion=2.0),
    "depthwise 3x3": partial(DepthwiseCell, expansion=3.0, kernel_size=3),
    "grouped": partial(DepthwiseCell, expansion=2.0, num_groups=2),
}


@pytest.mark.parametrize("build", CELLS.values(), ids=CELLS.keys())
@pytest.mark.parametrize(
    ("resampling", "out_channels", "side"),
    [(Resampling.SAME, 4, 8), (Resampling.DOWN, 8, 4), (Resampling.UP, 2, 16)],
)
def test_cell_changes_channels_and_resolution_as_told(
    build: Callable[..., nn.Module], resampling: Resampling, out_channels: int, side: int
) -> None:
    cell = build(4, out_channels, resampling)
    output = cell(torch.randn(3, 4, 8, 8))
    assert output.shape == (3, out_channels, side, side)
    assert output.isfinite().all()


@pytest.mark.parametrize("build", CELLS.values(), ids=CELLS.keys())
def test_residual_weighs_a_tenth(build: Callable[..., nn.Module]) -> None:
    cell = build(4, 4, squeeze_excitation=False).eval()
    x = torch.randn(2, 4, 8, 8)
    branch = cell.get_submodule("body")(x)
    assert branch.abs().max() > 0.01
    torch.testing.assert_close(10 * (cell(x) - x), branch, rtol=1e-3, atol=1e-4)


def test_gate_can_be_left_out() -> None:
    gated, plain = RegularCell(4, 4), RegularCell(4, 4, squeeze_excitation=False)
    assert any(isinstance(module, nn.Linear) for module in gated.modules())
    assert not any(isinstance(module, nn.Linear) for module in plain.modules())


@pytest.mark.parametrize("cell", [RegularCell, DepthwiseCell])
def test_cell_at_one_resolution_keeps_its_channels(cell: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="channels"):
        cell(4, 8)


def test_even_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel_size"):
        DepthwiseCell(4, 4, kernel_size=4)


@pytest.mark.parametrize(
    ("cell", "reach"),
    [
        (partial(RegularCell, dilations=(1, 1)), 2),
        (partial(RegularCell, dilations=(2, 1)), 3),
        (partial(RegularCell, dilations=(1,)), 1),
        (partial(DepthwiseCell, kernel_size=5), 2),
        (partial(DepthwiseCell, kernel_size=3), 1),
    ],
)
def test_receptive_field_is_that_of_the_convolutions(
    cell: Callable[..., nn.Module], reach: int
) -> None:
    x = torch.randn(1, 4, 11, 11, dtype=torch.float64, requires_grad=True)
    cell(4, 4, squeeze_excitation=False).double().eval()(x)[0, :, 5, 5].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0).nonzero() - 5
    assert seen.abs().max().item() == reach


def test_depthwise_cell_mixes_no_channels_in_its_middle_convolution() -> None:
    convolutions = [m for m in DepthwiseCell(4, 4).modules() if isinstance(m, nn.Conv2d)]
    assert [c.groups for c in convolutions] == [1, 24, 1]
    assert [c.kernel_size for c in convolutions] == [(1, 1), (5, 5), (1, 1)]


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("index", range(7))
def test_layers_with_hooks_are_called(index: int, trains: bool) -> None:
    cell = DepthwiseCell(4, 4, expansion=2.0).train(trains)
    x = torch.randn(2, 4, 8, 8)
    expected = cell(x)
    called = []
    layer = list(cell.body.children())[index]
    layer.register_forward_hook(lambda module, *_: called.append(module))
    with torch.set_grad_enabled(trains):
        torch.testing.assert_close(cell(x), expected)
    assert called == [layer]


def _with_statistics(cell: nn.Module) -> nn.Module:
    """Let normalisations have other numbers than those that change nothing."""
    for norm in cell.modules():
        if isinstance(norm, BatchNorm):
            for values in (norm.weight, norm.bias, norm.running_mean):
                assert values is not None
                nn.init.normal_(values)
            assert norm.running_var is not None
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return cell


@pytest.mark.parametrize("build", CELLS.values(), ids=CELLS.keys())
@pytest.mark.parametrize(
    ("resampling", "out_channels"),
    [(Resampling.SAME, 4), (Resampling.DOWN, 8), (Resampling.UP, 2)],
)
def test_inference_on_a_cpu_computes_what_the_layers_do(
    build: Callable[..., nn.Module], resampling: Resampling, out_channels: int
) -> None:
    cell = _with_statistics(build(4, out_channels, resampling)).double().eval()
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    layers = cell(x)  # with gradients, for which no normalisation becomes part of a convolution
    with torch.no_grad():
        torch.testing.assert_close(cell(x), layers, rtol=1e-12, atol=1e-12)
    assert layers.requires_grad


@pytest.mark.parametrize(("build", "left"), [(RegularCell, 1), (DepthwiseCell, 0)])
@torch.no_grad()
def test_inference_on_a_cpu_normalises_only_what_no_convolution_takes_up(
    monkeypatch: pytest.MonkeyPatch, build: type[nn.Module], left: int
) -> None:
    normalized = []
    forward = BatchNorm.forward
    monkeypatch.setattr(BatchNorm, "forward", lambda *args: normalized.append(1) or forward(*args))
    build(4, 4).eval()(torch.randn(2, 4, 8, 8))
    assert len(normalized) == left


def test_statistics_are_measured_without_gradients_too() -> None:
    cell = _with_statistics(DepthwiseCell(4, 4)).double().eval()
    for norm in cell.modules():
        if isinstance(norm, BatchNorm):
            norm.train()  # as when they are calibrated anew
    other = copy.deepcopy(cell)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    expected = cell(x)
    with torch.no_grad():
        torch.testing.assert_close(other(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(other.named_buffers()), dict(cell.named_buffers()))


@pytest.mark.parametrize("build", [RegularCell, DepthwiseCell])
@torch.no_grad()
def test_inference_in_16_bits_loses_no_more_than_the_layers_do(build: type[nn.Module]) -> None:
    cell = _with_statistics(build(16, 16)).eval()
    x = torch.randn(4, 16, 8, 8)
    expected = cell(x)

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return (cell(x) - expected).square().mean().sqrt().item()

    folded = error()
    with torch.enable_grad():
        assert folded < 1.5 * error()
