import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nvae_lightning.model.layers import (
    NormActConv,
    SkipDown,
    SkipUp,
    SqueezeExcitation,
    WeightNormConv2d,
    weight_norm,
)
from nvae_lightning.model.normalization import BatchNorm


def test_running_statistics_move_by_five_percent() -> None:
    layer = BatchNorm(2)
    x = torch.randn(4, 2, 3, 3) + 7
    layer(x)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    torch.testing.assert_close(layer.running_mean, 0.05 * x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, 0.95 + 0.05 * x.var((0, 2, 3)))


def test_a_unit_activates_the_standardised_batch() -> None:
    x = 4 * torch.randn(8, 3, 5, 5).double() - 2
    standard = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), correction=0)[
        :, None, None
    ]
    swish = standard / (1 + torch.exp(-standard))
    for activation, expected in ((nn.SiLU(), swish), (nn.ELU(), F.elu(standard))):
        unit = NormActConv(BatchNorm(3), activation, nn.Identity()).double()
        torch.testing.assert_close(unit(x), expected, rtol=1e-5, atol=1e-5)


def test_a_unit_calls_its_three_layers_in_order() -> None:
    unit = NormActConv(nn.Identity(), nn.ELU(), nn.Conv2d(1, 1, 1))
    called: list[nn.Module] = []
    for layer in unit.children():
        layer.register_forward_hook(lambda module, *_: called.append(module))
    x = torch.tensor([2.0, -1.0]).view(1, 1, 1, 2)
    output = unit(x)
    assert called == [unit.norm, unit.activation, unit.convolution]
    torch.testing.assert_close(output, unit.convolution(F.elu(x)))


def test_gate_scales_whole_channels_by_less_than_one() -> None:
    layer = SqueezeExcitation(8).double()
    x = torch.randn(2, 8, 5, 5).double()
    factor = layer(x) / x
    torch.testing.assert_close(factor, factor[:, :, :1, :1].expand_as(factor))
    assert (factor > 0.0).all()
    assert (factor < 1.0).all()


@pytest.mark.parametrize(("channels", "hidden"), [(8, 4), (64, 4), (128, 8), (512, 32)])
def test_gate_has_a_sixteenth_of_the_channels_as_hidden_units_and_at_least_four(
    channels: int, hidden: int
) -> None:
    assert SqueezeExcitation(channels).squeeze.out_features == hidden


@pytest.mark.parametrize("out_channels", [4, 8, 10])
def test_skip_down_halves_the_sides_and_sees_every_pixel(out_channels: int) -> None:
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    output = SkipDown(4, out_channels)(x)
    assert output.shape == (2, out_channels, 4, 4)
    output.square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()


def test_each_part_of_skip_down_reads_its_own_pixel_of_the_block() -> None:
    layer = SkipDown(1, 4)
    x = torch.zeros(1, 1, 2, 2)
    rest = layer(x)
    for part, (row, column) in enumerate([(0, 0), (1, 1), (0, 1), (1, 0)]):
        one = x.clone()
        one[0, 0, row, column] = 3.0
        changed = (layer(one) - rest).flatten()
        assert changed.nonzero().flatten().tolist() == [part]


def test_skip_down_is_a_strided_convolution_of_each_pixel_of_the_block() -> None:
    layer = SkipDown(12, 8).double()
    x = torch.randn(2, 12, 48, 48, dtype=torch.float64, requires_grad=True)
    parts = [
        F.conv2d(
            F.silu(x)[:, :, dy:, dx:],
            weight_norm(part.weight, part.log_gain),
            part.bias,
            stride=2,
        )
        for part, (dy, dx) in zip(layer.parts, [(0, 0), (1, 1), (0, 1), (1, 0)], strict=True)
        if isinstance(part, WeightNormConv2d)
    ]
    output = layer(x)
    torch.testing.assert_close(output, torch.cat(parts, 1), rtol=1e-12, atol=1e-12)


def test_gradients_of_skip_down_do_not_write_past_their_memory() -> None:
    # oneDNN's gradient of a strided 1x1 convolution of this shape and layout did, and crashed.
    layer = SkipDown(12, 32)
    for _ in range(40):
        x = torch.randn(2, 12, 64, 64).to(memory_format=torch.channels_last).requires_grad_()
        gradients = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
        kept = [torch.zeros(7 * n + 1) for n in range(50)]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not any(zeros.any() for zeros in kept)


def test_skip_up_doubles_the_sides_and_keeps_the_corners() -> None:
    layer = SkipUp(3, 3)
    with torch.no_grad():
        layer.convolution.weight.copy_(torch.eye(3)[:, :, None, None])
        layer.convolution.log_gain.zero_()
    x = torch.randn(2, 3, 4, 4)
    output = layer(x)
    assert output.shape == (2, 3, 8, 8)
    torch.testing.assert_close(output[:, :, ::7, ::7], x[:, :, ::3, ::3], rtol=1e-4, atol=1e-4)
    # Aligned corners: pixel 1 of 8 lies at 3/7 of the way from pixel 0 to pixel 1 of 4.
    torch.testing.assert_close(
        output[:, :, 0, 1], (4 * x[:, :, 0, 0] + 3 * x[:, :, 0, 1]) / 7, rtol=1e-4, atol=1e-4
    )
