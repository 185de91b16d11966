import pytest
import torch
from torch import Tensor, nn

from nvae_lightning.model.layers import DataDependentConv2d, WeightNormConv2d


def _batch() -> Tensor:
    return 3 * torch.randn(16, 4, 8, 8, dtype=torch.float64) + 2


def _assert_standardised(output: Tensor) -> None:
    assert output.mean((0, 2, 3)).abs().max() < 1e-4
    assert (output.std((0, 2, 3), correction=0) - 1.0).abs().max() < 1e-4


def test_first_training_output_has_mean_zero_and_standard_deviation_one() -> None:
    layer = DataDependentConv2d(4, 6, 3, padding=1).double().train()
    x = _batch()
    _assert_standardised(layer(x))
    _assert_standardised(layer.eval()(x))


def test_first_training_output_is_standardised_for_inputs_far_from_zero() -> None:
    layer = DataDependentConv2d(4, 6, 1).train()
    output = layer(_batch().float() + 500.0)
    assert (output.std((0, 2, 3), correction=0) - 1.0).abs().max() < 0.05


def test_a_non_finite_batch_defers_initialisation_to_the_next() -> None:
    layer = DataDependentConv2d(4, 6, 3, padding=1).double().train()
    assert not layer(_batch() * torch.nan).isfinite().any()
    assert layer.log_gain.isfinite().all()
    _assert_standardised(layer(_batch()))


def test_initialisation_happens_once() -> None:
    layer = DataDependentConv2d(4, 6, 3).double().train()
    layer(_batch())
    gain, bias = layer.log_gain.clone(), layer.bias
    assert bias is not None
    bias = bias.clone()
    output = layer(10 * _batch() + 7)
    assert torch.equal(layer.log_gain, gain)
    assert layer.bias is not None
    assert torch.equal(layer.bias, bias)
    assert output.std() > 5.0


def test_evaluation_does_not_initialise() -> None:
    layer = DataDependentConv2d(4, 6, 3).double().eval()
    before = {name: value.clone() for name, value in layer.named_parameters()}
    x = _batch()
    output = layer(x)
    for name, value in layer.named_parameters():
        assert torch.equal(value, before[name])
    plain = WeightNormConv2d(4, 6, 3).double()
    plain.load_state_dict(before)
    torch.testing.assert_close(output, plain(x))
    _assert_standardised(layer.train()(x))  # still pending


def test_a_completed_initialisation_survives_the_state_dict() -> None:
    layer = DataDependentConv2d(4, 6, 3).double().train()
    layer(_batch())
    resumed = DataDependentConv2d(4, 6, 3).double().train()
    resumed.load_state_dict(layer.state_dict())
    other = 10 * _batch() + 7
    assert torch.equal(resumed(other), layer(other))


def test_a_pending_initialisation_survives_the_state_dict() -> None:
    done = nn.Sequential(DataDependentConv2d(4, 6, 3)).double().train()
    fresh = nn.Sequential(DataDependentConv2d(4, 6, 3)).double().train()
    done(_batch())
    done.load_state_dict(fresh.state_dict())
    _assert_standardised(done(_batch()))


def test_gradients_flow_on_the_first_batch() -> None:
    layer = DataDependentConv2d(4, 6, 3).double().train()
    layer(_batch()).square().mul(torch.rand(16, 6, 6, 6)).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_layer_without_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        DataDependentConv2d(4, 6, 3, bias=False)
