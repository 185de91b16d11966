from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae_lightning.model.flows import causal_mask
from nvae_lightning.model.layers import (
    DataDependentConv2d,
    MaskedConv2d,
    WeightNormConv2d,
    stack_weights,
    weight_norm,
)


def _filter_norms(weight: Tensor) -> Tensor:
    return weight.flatten(-3).norm(dim=-1)


def _masked(in_channels: int, out_channels: int) -> MaskedConv2d:
    mask = causal_mask(out_channels, in_channels, 3, strict=True)
    return MaskedConv2d(mask, in_channels, out_channels, 3, padding=1)


def test_norm_of_every_filter_is_the_exponential_of_its_gain() -> None:
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64) * torch.logspace(-1, 2, 5).view(
        5, 1, 1, 1
    )
    log_gain = torch.randn(5, 1, 1, 1, dtype=torch.float64)
    norms = _filter_norms(weight_norm(weight, log_gain))
    torch.testing.assert_close(norms, log_gain.exp().flatten(), rtol=1e-4, atol=0.0)


def test_normalisation_keeps_the_direction_of_every_filter() -> None:
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    used = weight_norm(weight, torch.randn(5, 1, 1, 1, dtype=torch.float64))
    cosine = F.cosine_similarity(weight.flatten(1), used.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_normalising_a_stack_agrees_with_normalising_each_layer() -> None:
    weight = torch.randn(4, 5, 3, 3, 3, dtype=torch.float64)
    log_gain = torch.randn(4, 5, 1, 1, 1, dtype=torch.float64)
    one_by_one = [weight_norm(w, g) for w, g in zip(weight, log_gain, strict=True)]
    assert torch.equal(weight_norm(weight, log_gain), torch.stack(one_by_one))


def test_gradient_of_the_normalised_weight_agrees_with_finite_differences() -> None:
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    log_gain = torch.randn(2, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weight_norm, (weight, log_gain))


def test_filter_of_zeros_stays_zero_with_finite_gradients() -> None:
    weight = torch.zeros(2, 2, 3, 3, requires_grad=True)
    log_gain = torch.zeros(2, 1, 1, 1, requires_grad=True)
    used = weight_norm(weight, log_gain)
    used.sum().backward()
    assert used.abs().max() == 0.0
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_initial_effective_norm_is_the_default_norm_plus_a_hundredth() -> None:
    layer = WeightNormConv2d(6, 8, 3).double()
    used = stack_weights([layer])[0]
    torch.testing.assert_close(
        _filter_norms(used), _filter_norms(layer.weight) + 0.01, rtol=1e-4, atol=0.0
    )
    limit = 1 / (6 * 9) ** 0.5  # nn.Conv2d's uniform initialisation
    assert layer.weight.abs().max() <= limit
    assert used.abs().max() < 1.05 * limit


def test_masked_convolution_normalises_its_masked_weight() -> None:
    layer = _masked(2, 4).double()
    used = stack_weights([layer])[0]
    assert (used[layer.mask == 0] == 0.0).all()
    assert (used[layer.mask == 1] != 0.0).all()
    masked_norm = _filter_norms(layer.weight * layer.mask)
    torch.testing.assert_close(_filter_norms(used), masked_norm + 0.01, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Conv2d(4, 6, 3, padding=1),
        lambda: nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False),
        lambda: WeightNormConv2d(4, 6, 3, padding=1),
        lambda: WeightNormConv2d(4, 6, 1, bias=False),
        lambda: DataDependentConv2d(4, 6, 3, padding=1),
        lambda: _masked(4, 8),
    ],
    ids=["plain", "depthwise", "weight-norm", "weight-norm 1x1", "data-dependent", "masked"],
)
def test_stacked_weights_are_the_effective_weights_of_each_layer(
    build: Callable[[], nn.Conv2d],
) -> None:
    layers = [build().double().eval() for _ in range(3)]
    for layer in layers:
        if isinstance(layer, WeightNormConv2d):
            layer.log_gain.data.normal_()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for layer, weight in zip(layers, stack_weights(layers), strict=True):
        assert not isinstance(layer.padding, str)
        expected = F.conv2d(x, weight, layer.bias, padding=layer.padding, groups=layer.groups)
        torch.testing.assert_close(layer(x), expected)


def test_gradients_through_the_stack_agree_with_the_layers() -> None:
    layers = [_masked(2, 4).double() for _ in range(2)]
    x = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    x[torch.arange(2), torch.arange(2), 1, 1] = 1.0  # one delta per input channel
    parameters = [p for layer in layers for p in (layer.weight, layer.log_gain)]
    target = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64)

    # A convolution of a delta gives the kernel, flipped.
    through_layers = sum(
        ((layer(x) - layer.bias.view(-1, 1, 1)).flip((2, 3)).transpose(0, 1) * wanted).sum()
        for layer, wanted in zip(layers, target, strict=True)
        if layer.bias is not None
    )
    through_stack = (stack_weights(layers) * target).sum()
    assert isinstance(through_layers, Tensor)
    torch.testing.assert_close(through_layers, through_stack)
    expected = torch.autograd.grad(through_layers, parameters)
    for got, want in zip(torch.autograd.grad(through_stack, parameters), expected, strict=True):
        torch.testing.assert_close(got, want)
