import itertools

import pytest
import torch
from torch import Tensor

from nvae_lightning.model import BernoulliLikelihood, Image


def _all_binary_images(channels: int, size: int) -> Tensor:
    num_pixels = channels * size**2
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=num_pixels)))
    return images.double().view(-1, channels, size, size)


@pytest.mark.parametrize(("channels", "size", "padding"), [(1, 2, 1), (1, 3, 0), (3, 1, 2)])
def test_probabilities_of_all_binary_images_sum_to_one(
    channels: int, size: int, padding: int
) -> None:
    image = Image(channels=channels, size=size, bits=1, padding=padding)
    logits = 3 * torch.randn(1, channels, image.padded_size, image.padded_size).double()
    images = _all_binary_images(channels, size)
    distribution = BernoulliLikelihood(image)(logits.expand(len(images), -1, -1, -1))
    assert distribution.log_prob(images).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_log_probability_agrees_with_torch_distributions() -> None:
    image = Image(channels=1, size=4, bits=1)
    logits = 5 * torch.randn(3, 1, 4, 4, dtype=torch.float64)
    x = torch.bernoulli(torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64))
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(BernoulliLikelihood(image)(logits).log_prob(x), expected)


def test_padding_is_not_counted() -> None:
    image = Image(channels=1, size=4, bits=1, padding=2)
    x = torch.bernoulli(torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64))
    logits = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    border = torch.ones(8, 8, dtype=torch.bool)
    border[2:6, 2:6] = False
    changed = torch.where(border, 100 * torch.randn(2, 1, 8, 8).double(), logits)
    likelihood = BernoulliLikelihood(image)
    assert torch.equal(likelihood(logits).log_prob(x), likelihood(changed).log_prob(x))
    assert torch.equal(likelihood(logits).mean, likelihood(changed).mean)

    logits.requires_grad_()
    likelihood(logits).log_prob(x).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[:, :, border] == 0.0).all()
    assert (logits.grad[:, :, ~border] != 0.0).all()


def test_confident_logits_give_finite_probabilities_and_gradients_in_float32() -> None:
    image = Image(channels=1, size=1, bits=1)
    logits = torch.tensor([-1e4, -1e4, 1e4, 1e4]).view(4, 1, 1, 1).requires_grad_()
    x = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(4, 1, 1, 1)
    log_prob = BernoulliLikelihood(image)(logits).log_prob(x)
    log_prob.sum().backward()
    assert log_prob.tolist() == [0.0, -1e4, -1e4, 0.0]
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == [0.0, 1.0, -1.0, 0.0]


def test_draws_are_binary_with_the_mean_of_the_distribution() -> None:
    image = Image(channels=1, size=2, bits=1, padding=1)
    logits = torch.randn(1, 1, 4, 4, dtype=torch.float64).expand(20_000, -1, -1, -1)
    distribution = BernoulliLikelihood(image)(logits)
    draws = distribution.sample()
    assert draws.shape == (20_000, 1, 2, 2)
    assert ((draws == 0) | (draws == 1)).all()
    p = torch.sigmoid(logits[0, 0, 1:3, 1:3])
    torch.testing.assert_close(distribution.mean[0, 0], p)
    standard_error = (p * (1 - p) / len(draws)).sqrt()
    assert ((draws.mean((0, 1)) - p).abs() < 5 * standard_error).all()
