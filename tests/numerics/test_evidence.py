"""Likelihood estimates against the known likelihood of a linear-Gaussian hierarchy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from nvae_lightning.model import NVAE, Image, Latent, Normal

NOISE = 0.5  # standard deviation of the pixels


@dataclass(frozen=True)
class Pixels:
    """N(mean, NOISE²) of each pixel."""

    logits: Tensor

    @property
    def mean(self) -> Tensor:
        return self.logits

    def log_prob(self, image: Tensor) -> Tensor:
        std = torch.full_like(self.logits, NOISE)
        return Normal(self.logits, std.log()).log_prob(image).flatten(1).sum(1)

    def sample(self) -> Tensor:
        return self.logits + NOISE * torch.randn_like(self.logits)


class LinearGaussian(nn.Module):
    """One-pixel colours: z1 ~ N(0, 1), z2 ~ N(a z1, s²), x ~ N(b z1 + c z2, NOISE²)."""

    a, s = 0.8, 0.6
    b = torch.tensor([0.5, -1.0, 0.3], dtype=torch.float64)
    c = torch.tensor([1.0, 0.4, -0.7], dtype=torch.float64)

    def __init__(self, shift: float, width: float) -> None:
        super().__init__()
        self.shift, self.width = shift, width  # errors of the posterior

    def evidence(self, x: Tensor) -> Tensor:
        """Log density of the pixels in closed form."""
        loadings = torch.stack([self.b + self.a * self.c, self.s * self.c], 1)
        covariance = loadings @ loadings.T + NOISE**2 * torch.eye(3, dtype=torch.float64)
        exact = torch.distributions.MultivariateNormal(torch.zeros(3).double(), covariance)
        return exact.log_prob(x.flatten(1))

    def _posteriors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of (z1, z2) given x, exactly."""
        precision = torch.tensor(
            [[1 + (self.a / self.s) ** 2, -self.a / self.s**2], [-self.a / self.s**2, self.s**-2]],
            dtype=torch.float64,
        )
        loadings = torch.stack([self.b, self.c], 1)
        covariance = torch.linalg.inv(precision + loadings.T @ loadings / NOISE**2)
        return x.flatten(1) @ loadings @ covariance / NOISE**2, covariance

    def forward(
        self,
        batch_size: int,
        features: Sequence[Tensor] = (),
        noise: Sequence[Tensor] | None = None,
    ) -> tuple[tuple[Latent, ...], Tensor]:
        x = features[0].repeat(batch_size // len(features[0]), 1, 1, 1)
        mean, covariance = self._posteriors(x)
        zeros = x.new_zeros(batch_size, 1, 1, 1)
        first_prior = Normal(zeros, zeros)
        std = covariance[0, 0].sqrt() * self.width
        first = Normal(mean[:, :1, None, None] + self.shift, zeros + std.log())
        z1 = first.sample(None if noise is None else noise[0])
        slope = covariance[0, 1] / covariance[0, 0]
        rest = covariance[1, 1] - slope * covariance[0, 1]
        second_mean = mean[:, 1:, None, None] + slope * (z1 - mean[:, :1, None, None])
        second = Normal(second_mean + self.shift, zeros + (rest.sqrt() * self.width).log())
        z2 = second.sample(None if noise is None else noise[1])
        second_prior = Normal(self.a * z1, zeros + math.log(self.s))
        latents = Latent(first, first_prior, z1), Latent(second, second_prior, z2)
        by_channel = (1, 3, 1, 1)
        return latents, self.b.view(by_channel) * z1 + self.c.view(by_channel) * z2


class Toy(nn.Module):
    """Likelihood of the pixels."""

    def forward(self, logits: Tensor) -> Pixels:
        return Pixels(logits)


BuildToy = Callable[[float, float], tuple[NVAE, LinearGaussian]]


@pytest.fixture
def build_toy(colour_nvae: NVAE, monkeypatch: pytest.MonkeyPatch) -> BuildToy:
    """Build an NVAE with linear networks and a posterior with the given errors."""

    def build(shift: float, width: float) -> tuple[NVAE, LinearGaussian]:
        toy = LinearGaussian(shift, width)
        colour_nvae.image = Image(channels=3, size=1, bits=8)
        monkeypatch.setattr(colour_nvae, "_features", lambda x: [x, x])
        shapes = property(lambda self: [(1, 1, 1), (1, 1, 1)])
        monkeypatch.setattr(NVAE, "latent_shapes", shapes)
        monkeypatch.setattr(type(colour_nvae.hierarchy), "num_groups", 2)
        colour_nvae.decoder = toy  # pyright: ignore[reportAttributeAccessIssue]
        colour_nvae.likelihood = Toy()  # pyright: ignore[reportAttributeAccessIssue]
        return colour_nvae, toy

    return build


def _pixels() -> Tensor:
    return torch.tensor([[0.3, -0.2, 0.9], [1.5, 0.1, -1.0]]).double()[..., None, None]


def test_every_weight_of_the_exact_posterior_is_the_evidence(build_toy: BuildToy) -> None:
    model, toy = build_toy(0.0, 1.0)
    x = _pixels()
    weights = model.log_weights(x, 50)
    torch.testing.assert_close(weights, toy.evidence(x).expand(50, -1), rtol=1e-9, atol=1e-9)


def test_bound_rises_to_the_evidence_with_more_samples(build_toy: BuildToy) -> None:
    model, toy = build_toy(0.1, 1.3)
    x = _pixels()
    evidence = toy.evidence(x)
    gaps = []
    for num_samples, repeats in ((1, 4000), (10, 4000), (100, 4000)):
        weights = model.log_weights(x, num_samples * repeats).view(repeats, num_samples, -1)
        bounds = weights.logsumexp(1) - math.log(num_samples)
        gaps.append((evidence - bounds.mean(0)).mean().item())
    assert gaps[0] > 5 * gaps[1] > 0
    assert gaps[1] > 3 * gaps[2] > -0.005
    torch.testing.assert_close(
        model.log_likelihood(x, 200_000), evidence, rtol=0, atol=0.01, check_dtype=False
    )


def test_one_sample_estimates_the_elbo(build_toy: BuildToy) -> None:
    model, toy = build_toy(0.1, 1.3)
    x = _pixels()
    # E[log p(x, z)] - E[log q(z|x)] = evidence - KL(q || exact posterior), in closed form.
    _, covariance = toy._posteriors(x)
    slope = covariance[0, 1] / covariance[0, 0]
    rest = covariance[1, 1] - slope * covariance[0, 1]
    per_group = 0.5 * (1.3**2 - 1) - math.log(1.3)
    kl = 2 * per_group + 0.5 * 0.1**2 * (1 / covariance[0, 0] + 1 / rest)
    ones = model.log_weights(x, 40_000)
    error = 4 * ones.std(0) / math.sqrt(len(ones))
    assert ((ones.mean(0) - (toy.evidence(x) - kl)).abs() < error).all()
    torch.manual_seed(1)
    one = model.log_likelihood(x, 1)
    torch.manual_seed(1)
    assert torch.equal(one, model.log_weights(x, 1)[0])
