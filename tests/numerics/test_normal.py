import math

import pytest
import torch
from torch import Tensor

from nvae_lightning.model import Normal


def _random_normal(seed: int, shape: tuple[int, ...] = (4, 5)) -> Normal:
    generator = torch.Generator().manual_seed(seed)
    mean = 3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    log_std = 2 * torch.randn(shape, dtype=torch.float64, generator=generator)
    return Normal(mean, log_std)


def _torch_normal(normal: Normal) -> torch.distributions.Normal:
    return torch.distributions.Normal(normal.mean, normal.std)


@pytest.mark.parametrize("seed", range(3))
def test_log_density_agrees_with_torch_distributions(seed: int) -> None:
    normal = _random_normal(seed)
    value = 4 * torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(
        normal.log_prob(value), _torch_normal(normal).log_prob(value), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("seed", range(3))
def test_kl_agrees_with_torch_distributions(seed: int) -> None:
    one, other = _random_normal(seed), _random_normal(seed + 100)
    expected = torch.distributions.kl_divergence(_torch_normal(one), _torch_normal(other))
    torch.testing.assert_close(one.kl(other), expected, rtol=1e-11, atol=1e-11)


def test_kl_is_zero_to_itself_and_positive_to_others() -> None:
    one, other = _random_normal(1), _random_normal(2)
    assert one.kl(one).abs().max() == 0.0
    assert one.kl(other).min() > 0.0


def test_kl_is_the_expectation_of_the_log_density_ratio() -> None:
    one = Normal(torch.tensor([0.3], dtype=torch.float64), torch.tensor([-0.4]).double())
    other = Normal(torch.tensor([-0.5], dtype=torch.float64), torch.tensor([0.2]).double())
    wide = Normal(one.mean.expand(400_000), one.log_std.expand(400_000))
    draws = wide.sample()
    ratio = one.log_prob(draws) - other.log_prob(draws)
    standard_error = ratio.std() / math.sqrt(len(draws))
    assert (ratio.mean() - one.kl(other)).abs() < 5 * standard_error


def test_draws_have_the_mean_and_standard_deviation_of_the_distribution() -> None:
    num = 200_000
    normal = Normal(
        torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64).expand(num, 3),
        torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64).log().expand(num, 3),
    )
    draws = normal.sample()
    error = (draws.mean(0) - normal.mean[0]).abs() / normal.std[0]
    assert error.max() < 5 / math.sqrt(num)
    assert (draws.std(0) / normal.std[0] - 1).abs().max() < 5 / math.sqrt(2 * num)


def test_draw_from_given_noise_is_the_mean_plus_that_many_standard_deviations() -> None:
    normal = _random_normal(3)
    noise = torch.randn(4, 5, dtype=torch.float64)
    standardised = (normal.sample(noise) - normal.mean) / normal.log_std.exp()
    torch.testing.assert_close(standardised, noise, rtol=1e-9, atol=1e-9)


def test_temperature_zero_leaves_only_the_mean() -> None:
    normal = _random_normal(4)
    cold = normal.tempered(0.0)
    assert torch.equal(cold.sample(), normal.mean)
    assert cold.std.abs().max() == 0.0


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.5])
def test_temperature_scales_the_standard_deviation_and_leaves_the_mean(temperature: float) -> None:
    normal = _random_normal(5)
    tempered = normal.tempered(temperature)
    torch.testing.assert_close(tempered.std, temperature * normal.std, rtol=1e-12, atol=0.0)
    assert torch.equal(tempered.mean, normal.mean)


def _scan() -> Tensor:
    return torch.cat([torch.linspace(-30, 30, 601), torch.tensor([-1e4, 1e4])]).double()


def test_bounded_standard_deviation_is_the_clamped_exponential_plus_a_hundredth() -> None:
    raw = _scan()
    normal = Normal.soft_clamped(raw, raw)
    torch.testing.assert_close(normal.std, (5 * (raw / 5).tanh()).exp() + 0.01)
    torch.testing.assert_close(normal.mean, 5 * (raw / 5).tanh())


def test_bounds_of_the_soft_clamp_hold_and_are_reached() -> None:
    raw = _scan()
    normal = Normal.soft_clamped(raw, raw)
    slack = 1 + 1e-12
    assert normal.std.min() * slack >= math.exp(-5) + 0.01
    assert normal.std.max() <= (math.exp(5) + 0.01) * slack
    assert normal.mean.abs().max() <= 5.0
    assert normal.std.min().item() == pytest.approx(0.016737947, abs=1e-8)
    assert normal.std.max().item() == pytest.approx(148.42315910, abs=1e-6)
    assert normal.mean.max().item() == pytest.approx(5.0)


def test_soft_clamp_hardly_moves_small_parameters() -> None:
    raw = torch.tensor([0.0, 0.1, -0.1], dtype=torch.float64)
    normal = Normal.soft_clamped(raw, raw)
    assert normal.std[0].item() == pytest.approx(1.01)
    assert (normal.mean - raw).abs().max() < 2e-5


def test_kl_and_its_gradient_stay_finite_at_the_soft_clamp_bounds_in_float32() -> None:
    ends = torch.tensor([-1e4, -20.0, 0.0, 20.0, 1e4])
    grid = torch.cartesian_prod(ends, ends, ends, ends).requires_grad_()
    q = Normal.soft_clamped(grid[:, 0], grid[:, 1])
    p = Normal.soft_clamped(grid[:, 2], grid[:, 3])
    kl = q.kl(p)
    kl.sum().backward()
    assert grid.grad is not None
    assert kl.isfinite().all()
    assert grid.grad.isfinite().all()
    assert kl.min() > -1e-4
