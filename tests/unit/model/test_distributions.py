import pytest
import torch
from torch import Tensor

from nvae_lightning.model import (
    BernoulliLikelihood,
    FlowPair,
    Image,
    Inference,
    Latent,
    Normal,
)
from nvae_lightning.model.layers import full_precision

SHAPE = (3, 2, 4, 4)


def _normal() -> Normal:
    return Normal(torch.randn(SHAPE).double(), 0.3 * torch.randn(SHAPE).double())


def _reference(normal: Normal) -> torch.distributions.Independent:
    return torch.distributions.Independent(torch.distributions.Normal(normal.mean, normal.std), 3)


def _latent_with_flow() -> Latent:
    posterior, prior = _normal(), _normal()
    base = posterior.sample()
    with torch.no_grad():
        z = FlowPair(2).double()(base)
    return Latent(posterior, prior, z=z, base=base)


def test_kl_without_flows_is_in_closed_form_and_summed_per_image() -> None:
    posterior, prior = _normal(), _normal()
    latent = Latent(posterior, prior, z=posterior.sample())
    expected = torch.distributions.kl_divergence(_reference(posterior), _reference(prior))
    torch.testing.assert_close(latent.kl, expected)
    torch.testing.assert_close(latent.kl_map.sum((1, 2, 3)), expected)


def test_densities_are_summed_per_image() -> None:
    posterior, prior = _normal(), _normal()
    latent = Latent(posterior, prior, z=posterior.sample())
    torch.testing.assert_close(latent.log_q, _reference(posterior).log_prob(latent.z))
    torch.testing.assert_close(latent.log_p, _reference(prior).log_prob(latent.z))


def test_flow_moves_the_draw_under_the_prior_and_not_under_the_posterior() -> None:
    latent = _latent_with_flow()
    assert latent.base is not None
    assert not torch.equal(latent.base, latent.z)
    torch.testing.assert_close(latent.log_q, _reference(latent.posterior).log_prob(latent.base))
    torch.testing.assert_close(latent.log_p, _reference(latent.prior).log_prob(latent.z))


def test_kl_under_flows_is_the_one_sample_estimate() -> None:
    latent = _latent_with_flow()
    torch.testing.assert_close(latent.kl, latent.log_q - latent.log_p)


def test_log_weight_is_joint_over_posterior() -> None:
    image = Image(channels=1, size=4, bits=1)
    x = torch.bernoulli(torch.full((3, 1, 4, 4), 0.5)).double()
    likelihood = BernoulliLikelihood(image)(torch.randn(3, 1, 4, 4).double())
    posterior, prior = _normal(), _normal()
    plain = Latent(posterior, prior, z=posterior.sample())
    flowed = _latent_with_flow()
    got = Inference(likelihood, (plain, flowed)).log_weight(x)

    assert flowed.base is not None
    joint = (
        torch.distributions.Bernoulli(logits=likelihood.logits).log_prob(x).sum((1, 2, 3))
        + _reference(prior).log_prob(plain.z)
        + _reference(flowed.prior).log_prob(flowed.z)
    )
    encoded = _reference(posterior).log_prob(plain.z) + _reference(flowed.posterior).log_prob(
        flowed.base
    )
    torch.testing.assert_close(got, joint - encoded)


@pytest.mark.parametrize(
    ("dtype", "lifted"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_only_16_bit_dtypes_are_cast_to_float32(dtype: torch.dtype, lifted: torch.dtype) -> None:
    x: Tensor = torch.randn(3, dtype=torch.float64).to(dtype)
    assert full_precision(x).dtype == lifted
    assert torch.equal(full_precision(x).double(), x.double())
