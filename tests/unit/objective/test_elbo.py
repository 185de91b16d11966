import math

import pytest
import torch

from nvae_lightning.model import NVAE, BernoulliLikelihood, Image, Inference, Latent, Normal
from nvae_lightning.objective import ELBO, bits_per_dim, elbo


def test_bound_is_minus_distortion_minus_the_rate_of_all_groups() -> None:
    terms = ELBO(
        distortion=torch.tensor([10.0, 20.0]), rate=torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    )
    assert terms.value.tolist() == [-14.0, -18.0]


def test_terms_match_the_inference(nvae: NVAE) -> None:
    image = nvae.image
    x = torch.randint(0, 2, (3, image.channels, image.size, image.size)).float()
    inference = nvae(x)
    terms = elbo(inference, x)
    assert terms.rate.shape == (3, 3)
    torch.testing.assert_close(terms.distortion, -inference.likelihood.log_prob(x))
    for rate, latent in zip(terms.rate, inference.latents, strict=True):
        torch.testing.assert_close(rate, latent.kl)
    assert (terms.distortion > 0).all()


def test_bound_under_flows_is_the_log_weight(flow_nvae: NVAE) -> None:
    x = torch.randint(0, 256, (3, 3, 8, 8)).float() / 255
    inference = flow_nvae(x)
    torch.testing.assert_close(
        elbo(inference, x).value, inference.log_weight(x), rtol=1e-4, atol=1e-2
    )


def test_bound_in_closed_form_is_the_expected_log_weight() -> None:
    num = 50_000
    image = Image(channels=1, size=2, bits=1)
    x = torch.tensor([0.0, 1.0, 1.0, 0.0]).view(1, 1, 2, 2).double().expand(num, -1, -1, -1)
    mean = torch.randn(1, 2, 2, 2).double().expand(num, -1, -1, -1)
    zeros = torch.zeros_like(mean)
    posterior, prior = Normal(mean, zeros - 0.5), Normal(zeros, zeros)
    likelihood = BernoulliLikelihood(image)(torch.randn(1, 1, 2, 2).double().expand_as(x))
    inference = Inference(likelihood, (Latent(posterior, prior, z=posterior.sample()),))
    bound = elbo(inference, x).value
    log_weights = inference.log_weight(x)
    assert bound.max() - bound.min() < 1e-9
    assert (log_weights.mean() - bound[0]).abs() < 5 * log_weights.std() / math.sqrt(num)


def test_uniform_8_bit_images_cost_8_bits_per_dim() -> None:
    num_dims = Image(channels=3, size=32, bits=8).num_dims
    assert bits_per_dim(num_dims * math.log(256), num_dims) == pytest.approx(8.0)
    nats = torch.tensor([1.0, 2.0]) * num_dims * math.log(256)
    converted = bits_per_dim(nats, num_dims)
    assert isinstance(converted, torch.Tensor)
    assert converted.tolist() == pytest.approx([8.0, 16.0])
