from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from nvae_lightning.model import DepthwiseCell, RegularCell, Resampling
from nvae_lightning.model.layers import NormActConv
from nvae_lightning.model.normalization import BatchNorm


@pytest.mark.parametrize(
    ("resampling", "out_channels", "side"),
    [(Resampling.SAME, 4, 8), (Resampling.DOWN, 8, 4), (Resampling.UP, 2, 16)],
)
def test_a_cell_changes_channels_and_resolution(
    build_cell: Callable[..., nn.Module], resampling: Resampling, out_channels: int, side: int
) -> None:
    cell = build_cell(4, out_channels, resampling)
    output = cell(torch.randn(3, 4, 8, 8))
    assert output.shape == (3, out_channels, side, side)
    assert output.isfinite().all()


def test_the_residual_has_weight_a_tenth(build_cell: Callable[..., nn.Module]) -> None:
    cell = build_cell(4, 4, squeeze_excitation=False).eval()
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
def test_receptive_field_matches_the_convolutions(
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


def test_the_encoder_cell_is_two_units_and_the_decoder_cell_three_and_a_normalisation() -> None:
    for resampling, out_channels in ((Resampling.SAME, 4), (Resampling.DOWN, 8)):
        encoder, decoder = RegularCell(4, out_channels, resampling), DepthwiseCell(4, 4)
        assert [type(layer) for layer in encoder.body.children()] == 2 * [NormActConv]
        assert [type(layer) for layer in decoder.body.children()] == 3 * [NormActConv] + [
            BatchNorm
        ]
    assert "body.1.convolution.log_gain" in RegularCell(4, 4).state_dict()
    assert "body.0.norm.running_var" in DepthwiseCell(4, 4).state_dict()
