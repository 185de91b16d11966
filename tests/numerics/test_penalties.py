import copy

import pytest
import torch
from torch import Tensor, nn

from nvae_lightning.model import NVAE
from nvae_lightning.model.flows import causal_mask
from nvae_lightning.model.layers import MaskedConv2d, WeightNormConv2d, stack_weights
from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.objective import SpectralPenalty, bn_scale_penalty


def _spread(model: nn.Module) -> nn.Module:
    """Separate every convolution's two largest singular values, so that iterations converge."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                left = torch.randn(module.out_channels, 1, 1, 1)
                module.weight += left * torch.randn_like(module.weight[:1])
    return model.double()


def _every_kind_of_convolution() -> nn.Module:
    return _spread(
        nn.Sequential(
            nn.Conv2d(4, 6, 3),
            nn.Conv2d(4, 6, 3),
            nn.Conv2d(6, 6, 5, groups=6, bias=False),
            WeightNormConv2d(4, 6, 3),
            WeightNormConv2d(6, 4, 1),
            nn.Sequential(WeightNormConv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Linear(3, 3)),
            MaskedConv2d(causal_mask(8, 4, 3, strict=True), 4, 8, 3),
            MaskedConv2d(causal_mask(8, 4, 3, strict=True, reverse=True), 4, 8, 3),
        )
    )


def _exact(model: nn.Module) -> Tensor:
    norms = [
        torch.linalg.matrix_norm(stack_weights([module])[0].flatten(1), ord=2)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    return torch.stack(norms).sum()


def test_penalty_is_the_sum_of_the_largest_singular_values() -> None:
    model = _every_kind_of_convolution()
    penalty = SpectralPenalty(model).double()
    for _ in range(30):
        penalty()
    torch.testing.assert_close(penalty(), _exact(model), rtol=1e-9, atol=0.0)


def test_gradient_agrees_with_the_exact_singular_values() -> None:
    model = _every_kind_of_convolution()
    penalty = SpectralPenalty(model, first_iterations=500).double()
    parameters = {
        f"{name}.{kind}": parameter
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        for kind, parameter in module.named_parameters()
        if kind != "bias"
    }
    got = torch.autograd.grad(penalty(), list(parameters.values()))
    expected = torch.autograd.grad(_exact(model), list(parameters.values()))
    for name, one, other in zip(parameters, got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8, msg=lambda m, n=name: n + m)


def test_estimate_after_the_first_call_is_close_from_below(colour_nvae: NVAE) -> None:
    estimate = SpectralPenalty(colour_nvae)()
    exact = _exact(colour_nvae)
    assert 0.99 * exact < estimate < exact + 1e-4


def test_penalty_counts_every_convolution_of_the_model_with_flows(flow_nvae: NVAE) -> None:
    penalty = SpectralPenalty(flow_nvae, first_iterations=200)
    torch.testing.assert_close(penalty(), _exact(flow_nvae), rtol=1e-3, atol=0.0)


def _after(iterations: int, ratio: float) -> float:
    """Estimate for singular values 1 and ``ratio``, from a left vector that mixes both equally."""
    return ((1 + ratio ** (4 * iterations)) / (1 + ratio ** (4 * iterations - 2))) ** 0.5


def _two_singular_values(ratio: float, **iterations: int) -> SpectralPenalty:
    model = nn.Conv2d(2, 2, 1, bias=False).double()
    model.weight.data = torch.diag(torch.tensor([1.0, ratio], dtype=torch.float64))[
        :, :, None, None
    ]
    penalty = SpectralPenalty(model, **iterations).double()
    penalty.get_buffer("left_0").fill_(0.5**0.5)
    return penalty


def test_first_call_makes_200_iterations_and_each_later_one_4() -> None:
    ratio = 0.998
    penalty = _two_singular_values(ratio)
    values = [penalty().item() for _ in range(4)]
    expected = [_after(n, ratio) for n in (200, 204, 208, 212)]
    assert values == pytest.approx(expected, rel=1e-12)
    assert values[0] < values[1] < values[2] < values[3] < 1.0


def test_numbers_of_iterations_are_settings() -> None:
    penalty = _two_singular_values(0.9, first_iterations=3, iterations=2)
    values = [penalty().item() for _ in range(3)]
    assert values == pytest.approx([_after(n, 0.9) for n in (3, 5, 7)], rel=1e-12)


def test_evaluation_does_not_move_the_vectors() -> None:
    model = _every_kind_of_convolution()
    penalty = SpectralPenalty(model).double()
    fresh = copy.deepcopy(penalty.state_dict())
    penalty.eval()
    first = penalty()
    assert penalty() == first
    after = penalty.state_dict()
    assert after.keys() == fresh.keys()
    for key, value in fresh.items():
        assert after[key].equal(value) if isinstance(value, Tensor) else after[key] == value
    # The next call in training still counts as the first.
    assert penalty.train()() == first


def test_training_moves_the_vectors_and_keeps_them_normalised() -> None:
    penalty = SpectralPenalty(_every_kind_of_convolution()).double()
    before = [buffer.clone() for buffer in penalty.buffers()]
    penalty()
    for old, new in zip(before, penalty.buffers(), strict=True):
        assert not torch.equal(old, new)
        torch.testing.assert_close(new.norm(dim=1), torch.ones_like(new[:, 0]))


def test_restored_penalty_resumes_from_the_saved_vectors() -> None:
    model = _every_kind_of_convolution()
    penalty = SpectralPenalty(model, first_iterations=3, iterations=1).double()
    penalty()
    resumed = SpectralPenalty(model, first_iterations=3, iterations=1).double()
    resumed.load_state_dict(penalty.state_dict())
    assert [resumed().item() for _ in range(3)] == [penalty().item() for _ in range(3)]


def test_layers_iterated_together_agree_with_single_layers() -> None:
    layers = [_spread(WeightNormConv2d(4, 6, 3)) for _ in range(3)]
    together = SpectralPenalty(nn.Sequential(*layers), first_iterations=5).double()
    alone = [SpectralPenalty(layer, first_iterations=5).double() for layer in layers]
    assert len(list(together.buffers())) == 1
    for index, one in enumerate(alone):
        one.get_buffer("left_0").copy_(together.get_buffer("left_0")[index : index + 1])
    for _ in range(2):
        separate = torch.stack([one() for one in alone]).sum()
        torch.testing.assert_close(together(), separate, rtol=1e-12, atol=0.0)


def test_convolutions_of_one_shape_and_different_class_are_not_mixed_up() -> None:
    layers = [_spread(layer) for layer in (nn.Conv2d(4, 6, 3), WeightNormConv2d(4, 6, 3))]
    penalty = SpectralPenalty(nn.Sequential(*layers), first_iterations=300).double()
    exact = torch.stack([_exact(layer) for layer in layers]).sum()
    torch.testing.assert_close(penalty(), exact, rtol=1e-9, atol=0.0)


def test_penalised_model_is_not_a_submodule_of_the_penalty() -> None:
    penalty = SpectralPenalty(_every_kind_of_convolution())
    assert list(penalty.parameters()) == []
    assert len(list(penalty.modules())) == 1


def test_autocast_does_not_lower_the_precision() -> None:
    model = _every_kind_of_convolution().float()
    penalty = SpectralPenalty(model).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = penalty()
    assert lowered.dtype == torch.float32
    torch.testing.assert_close(lowered, penalty(), rtol=1e-6, atol=0.0)


def test_bn_scale_penalty_sums_the_largest_magnitudes() -> None:
    outer, inner = nn.BatchNorm2d(3), nn.BatchNorm2d(2)
    outer.weight.data = torch.tensor([1.0, -3.0, 2.0])
    inner.weight.data = torch.tensor([0.5, 0.25])
    value = bn_scale_penalty(nn.Sequential(outer, nn.Sequential(inner), nn.Conv2d(1, 1, 1)))
    assert value.item() == 3.5
    gradients = torch.autograd.grad(value, [outer.weight, inner.weight])
    assert [gradient.tolist() for gradient in gradients] == [[0.0, -1.0, 0.0], [1.0, 0.0]]


def test_bn_scale_penalty_of_a_model_agrees_with_a_loop(colour_nvae: NVAE) -> None:
    total = 0.0
    for name, parameter in colour_nvae.named_parameters():
        owner = colour_nvae.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, BatchNorm) and name.endswith("weight"):
            parameter.data.normal_()
            total += max(abs(v) for v in parameter.tolist())
    assert total > 1.0
    assert bn_scale_penalty(colour_nvae).item() == pytest.approx(total, rel=1e-5)


def test_bn_scale_penalty_without_batch_normalisation_is_zero() -> None:
    assert bn_scale_penalty(nn.Conv2d(1, 1, 1)).item() == 0.0


def test_bn_scale_penalty_counts_synchronised_layers() -> None:
    first = nn.BatchNorm2d(3)
    first.weight = nn.Parameter(torch.tensor([0.5, -2.0, 1.0]))
    model = nn.Sequential(first, nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert isinstance(synchronised.get_submodule("0"), nn.SyncBatchNorm)
    assert bn_scale_penalty(model).item() == bn_scale_penalty(synchronised).item() == 3.0
