import math

import pytest
import torch
from torch import Tensor

from nvae_lightning.model import Normal, importance_weighted_bound


def test_one_sample_gives_its_log_weight() -> None:
    log_weights = torch.randn(1, 5, dtype=torch.float64) - 1000
    torch.testing.assert_close(importance_weighted_bound(log_weights), log_weights[0])


def test_copies_of_one_sample_do_not_change_the_bound() -> None:
    log_weights = torch.randn(1, 5, dtype=torch.float64) - 1000
    torch.testing.assert_close(importance_weighted_bound(log_weights.expand(7, 5)), log_weights[0])


def test_bound_is_between_the_average_and_the_largest_log_weight() -> None:
    log_weights = 3 * torch.randn(6, 100, dtype=torch.float64) - 5000
    bound = importance_weighted_bound(log_weights)
    assert (bound > log_weights.mean(0)).all()
    assert (bound < log_weights.max(0).values).all()


def test_bound_of_two_weights_is_the_logarithm_of_their_mean() -> None:
    log_weights = torch.tensor([[math.log(2.0)], [math.log(4.0)]], dtype=torch.float64)
    assert importance_weighted_bound(log_weights).item() == pytest.approx(math.log(3.0))


def test_expected_bound_grows_with_the_number_of_samples() -> None:
    log_weights = torch.randn(64, 4000, dtype=torch.float64)
    averages = [importance_weighted_bound(log_weights[:k]).mean().item() for k in (1, 2, 8, 64)]
    assert averages[0] < averages[1] < averages[2] < averages[3]
    assert averages[3] < 0.5  # log E[w] of a log-normal weight


def _toy(x: Tensor, posterior: Normal, num_samples: int) -> Tensor:
    """Bound for z ~ N(0, 1), x ~ N(z, 0.5²)."""
    expanded = Normal(
        posterior.mean.expand(num_samples, -1), posterior.log_std.expand(num_samples, -1)
    )
    z = expanded.sample()
    prior = Normal(torch.zeros_like(z), torch.zeros_like(z))
    likelihood = Normal(z, torch.full_like(z, 0.5).log())
    log_weights = (
        likelihood.log_prob(x.expand(num_samples, -1)) + prior.log_prob(z) - expanded.log_prob(z)
    )
    return importance_weighted_bound(log_weights)


def _evidence(x: Tensor) -> Tensor:
    return -0.5 * (x.square() / 1.25 + math.log(2 * math.pi * 1.25))


def test_bound_is_the_evidence_for_the_exact_posterior() -> None:
    x = torch.tensor([-2.0, 0.1, 1.3], dtype=torch.float64)
    exact = Normal(x / 1.25, torch.full_like(x, 0.25 / 1.25).sqrt().log())
    torch.testing.assert_close(_toy(x, exact, 1), _evidence(x), rtol=1e-10, atol=1e-10)


def test_bound_converges_to_the_evidence_for_a_wrong_posterior() -> None:
    x = torch.tensor([-2.0, 0.1, 1.3], dtype=torch.float64)
    wrong = Normal(x / 1.25 + 0.3, torch.full_like(x, 0.7).log())
    assert (_toy(x, wrong, 200_000) - _evidence(x)).abs().max() < 0.01
    one_sample = torch.stack([_toy(x, wrong, 1) for _ in range(300)]).mean(0)
    assert (one_sample < _evidence(x) - 0.1).all()
