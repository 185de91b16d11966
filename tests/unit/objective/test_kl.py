import math

import pytest
import torch
from torch import Tensor

from nvae_lightning.model import Hierarchy, Latent, Normal
from nvae_lightning.objective import (
    active_channels,
    balance_kl,
    balancing_factors,
    channel_rates,
    size_factor,
)


def _hierarchy(*num_groups: int) -> Hierarchy:
    return Hierarchy.doubling(channels=4, num_groups=num_groups, downsample=2, latent_channels=2)


@pytest.mark.parametrize(
    ("num_groups", "per_scale"),
    [
        ((30,), (1.0,)),
        ((1, 2), (1.0, 2.0)),
        ((3, 3), (1.0, 4.0)),
        ((5, 10), (1.0, 2.0)),
        ((5, 10, 20), (1.0, 2.0, 4.0)),
        ((4, 4, 4, 8, 16), (1.0, 4.0, 16.0, 32.0, 64.0)),
    ],
)
def test_size_factors_have_the_published_values(
    num_groups: tuple[int, ...], per_scale: tuple[float, ...]
) -> None:
    expected = [factor for factor, n in zip(per_scale, num_groups, strict=True) for _ in range(n)]
    assert size_factor(_hierarchy(*num_groups)).tolist() == pytest.approx(expected)


def test_size_factors_follow_the_growth_and_are_at_least_one() -> None:
    assert size_factor(_hierarchy(2, 2), growth=2.0).tolist() == pytest.approx([1, 1, 2, 2])
    assert size_factor(_hierarchy(1, 4), growth=2.0).tolist() == pytest.approx([2, 1, 1, 1, 1])


def test_balancing_factors_are_inverse_to_the_size() -> None:
    rate = torch.ones(15, 4)  # groups of equal KL: five of size factor 1, ten of 2
    factors = balancing_factors(rate, size_factor(_hierarchy(5, 10)))
    assert factors.tolist() == pytest.approx([1.5] * 5 + [0.75] * 10)


def test_balancing_factors_are_proportional_to_the_mean_magnitude_plus_a_hundredth() -> None:
    rate = torch.tensor([[1.0, 3.0], [-2.0, 4.0], [0.0, 0.0]])
    factors = balancing_factors(rate, torch.tensor([1.0, 2.0, 1.0]))
    raw = [2.01, 3.01 / 2, 0.01]
    assert factors.tolist() == pytest.approx([3 * r / sum(raw) for r in raw])


def test_balancing_factors_average_to_one() -> None:
    rate = 100 * torch.randn(36, 8).double()
    factors = balancing_factors(rate, size_factor(_hierarchy(4, 4, 4, 8, 16)).double())
    assert factors.mean().item() == pytest.approx(1.0, rel=1e-12)
    assert factors.min() > 0.0


def test_no_gradient_flows_through_the_balancing_factors() -> None:
    rate = torch.rand(3, 4).double().requires_grad_()
    size = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    factors = balancing_factors(rate, size)
    assert not factors.requires_grad
    (gradient,) = torch.autograd.grad(balance_kl(rate, size, 0.3).sum(), rate)
    torch.testing.assert_close(gradient, 0.3 * factors[:, None].expand(3, 4))


def test_balanced_term_weighs_the_signed_kl_of_every_image() -> None:
    rate = torch.tensor([[1.0, 3.0], [-2.0, 4.0]])
    raw = [2.01, 3.01 / 2]
    gamma = [2 * r / sum(raw) for r in raw]
    term = balance_kl(rate, torch.tensor([1.0, 2.0]), 0.5)
    expected = [0.5 * (gamma[0] * 1 - gamma[1] * 2), 0.5 * (gamma[0] * 3 + gamma[1] * 4)]
    assert term.tolist() == pytest.approx(expected)


def test_balancing_ends_with_the_warm_up() -> None:
    rate = torch.rand(3, 4)
    size = torch.tensor([1.0, 5.0, 25.0])
    torch.testing.assert_close(balance_kl(rate, size, 1.0), rate.sum(0))
    assert (balance_kl(rate, size, 0.999) - rate.sum(0)).abs().max() > 0.01


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.999, 1.0])
def test_a_tensor_as_weight_gives_the_same_term(beta: float) -> None:
    rate, size = torch.randn(3, 4), torch.tensor([1.0, 2.0, 4.0])
    expected = balance_kl(rate, size, beta)
    torch.testing.assert_close(balance_kl(rate, size, torch.tensor(beta)), expected)


@pytest.mark.parametrize("beta", [1e-4, 0.5, 1.0])
def test_term_without_size_factors_is_the_weighted_plain_sum(beta: float) -> None:
    rate = torch.rand(3, 4)
    torch.testing.assert_close(balance_kl(rate, None, beta), beta * rate.sum(0))


def _latent_of_kl(kl: Tensor) -> Latent:
    """Build a posterior of unit variance whose KL to the standard normal is ``kl``."""
    zeros = torch.zeros_like(kl)
    return Latent(Normal((2 * kl).sqrt(), zeros), Normal(zeros, zeros), z=zeros)


def test_channels_are_active_above_a_tenth_of_a_nat() -> None:
    kl = torch.tensor([0.0, 0.09, 0.11, 5.0])[None, :, None, None].expand(2, 4, 3, 3)
    assert active_channels(channel_rates(_latent_of_kl(kl))).item() == 2
    assert active_channels(channel_rates(_latent_of_kl(kl)), threshold=1.0).item() == 1
    assert active_channels(channel_rates(_latent_of_kl(kl)), threshold=0.05).item() == 3


def test_activity_is_averaged_over_batch_and_space() -> None:
    kl = torch.zeros(2, 3, 4, 4)
    kl[0, 0, 1, 1] = 32 * 0.11  # one of 32 elements makes the channel active
    kl[0, 1, 1, 1] = 32 * 0.09
    assert active_channels(channel_rates(_latent_of_kl(kl))).item() == 1


def test_activity_with_flows_uses_the_one_sample_estimate() -> None:
    zeros = torch.zeros(1, 2, 2, 2)
    z = torch.tensor([0.0, 1.0])[None, :, None, None].expand(1, 2, 2, 2)
    latent = Latent(Normal(zeros, zeros), Normal(zeros, zeros), z=z, base=zeros)
    assert latent.kl.item() == pytest.approx(4 * 0.5)
    assert active_channels(channel_rates(latent)).item() == 1
    assert math.isclose(latent.kl_map[:, 0].sum().item(), 0.0, abs_tol=1e-6)
