"""Normal distributions of the latent groups, and the output of inference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from nvae_lightning.model.likelihood import PixelDistribution

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Normal:
    r"""Factorised normal distribution :math:`N(\mu, \sigma^2)` of each element.

    Args:
        mean: Mean :math:`\mu`.
        log_std: Logarithm of the standard deviation, :math:`\log \sigma`, of the same shape.
    """

    mean: Float[Tensor, "*shape"]
    log_std: Float[Tensor, "*shape"]

    @property
    def std(self) -> Float[Tensor, "*shape"]:
        """Standard deviation."""
        return self.log_std.exp()

    @classmethod
    def soft_clamped(
        cls, mean: Float[Tensor, "*shape"], log_std: Float[Tensor, "*shape"]
    ) -> Normal:
        r"""Bound the raw output of a network, so that KL and samples stay finite.

        .. math::
            \mu' = 5 \tanh(\mu / 5), \qquad \sigma' = e^{5 \tanh(\log \sigma / 5)} + 0.01

        Source: the published weights; Vahdat & Kautz 2020, Sec. 3.2, bounds σ from below.
        """
        std = torch.exp(5.0 * torch.tanh(log_std / 5.0)) + 1e-2
        return cls(5.0 * torch.tanh(mean / 5.0), std.log())

    def tempered(self, temperature: float | Float[Tensor, ""]) -> Normal:
        """Scale the standard deviation by ``temperature``; 0 gives a point mass at the mean."""
        factor = torch.as_tensor(temperature, dtype=self.log_std.dtype)
        return Normal(self.mean, self.log_std + factor.log())

    def sample(self, noise: Float[Tensor, "*shape"] | None = None) -> Float[Tensor, "*shape"]:
        """Draw by reparameterisation, using standard-normal ``noise`` if given."""
        if noise is None:
            noise = torch.randn_like(self.mean)
        return self.mean + self.std * noise

    def log_prob(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Log density of each element, in nats."""
        standardised = (value - self.mean) / self.std
        return -0.5 * standardised.square() - self.log_std - _HALF_LOG_TWO_PI

    def kl(self, other: Normal) -> Float[Tensor, "*shape"]:
        r"""Elementwise :math:`KL(self \| other)` in nats.

        .. math::
            \tfrac12 (t_1^2 + t_2^2 - 1) - \log t_2, \quad
            t_1 = (\mu - \mu_o) / \sigma_o, \; t_2 = \sigma / \sigma_o

        Source: Vahdat & Kautz 2020, Eq. 2.
        """
        log_ratio = self.log_std - other.log_std
        shift = (self.mean - other.mean) / other.std
        return 0.5 * (shift.square() + torch.exp(2 * log_ratio) - 1.0) - log_ratio


def _sum(per_element: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    return per_element.flatten(1).sum(1)


@dataclass(frozen=True)
class Latent:
    """One latent group: its posterior, its prior and the draw.

    Args:
        posterior: Posterior q(z | x, z of coarser groups), before any flow.
        prior: Prior p(z | z of coarser groups).
        z: Value that the decoder reads.
        base: Draw from ``posterior`` that volume-preserving flows turned into ``z``; None
            without flows.
    """

    posterior: Normal
    prior: Normal
    z: Float[Tensor, "batch channel height width"]
    base: Float[Tensor, "batch channel height width"] | None = None

    @property
    def kl_map(self) -> Float[Tensor, "batch channel height width"]:
        """KL of every latent variable, in closed form or, with flows, from one sample."""
        if self.base is None:
            return self.posterior.kl(self.prior)
        return self.posterior.log_prob(self.base) - self.prior.log_prob(self.z)

    @property
    def kl(self) -> Float[Tensor, " batch"]:
        """KL of the group in nats per image; with flows an estimate, which may be negative."""
        return _sum(self.kl_map)

    @property
    def log_q(self) -> Float[Tensor, " batch"]:
        """Log density of the draw under the posterior; the flows preserve volume."""
        return _sum(self.posterior.log_prob(self.z if self.base is None else self.base))

    @property
    def log_p(self) -> Float[Tensor, " batch"]:
        """Log density of the draw under the prior."""
        return _sum(self.prior.log_prob(self.z))


@dataclass(frozen=True)
class Inference:
    """Output of a pass through the model: p(x | z) and the latent groups, coarsest first."""

    likelihood: PixelDistribution
    latents: tuple[Latent, ...]

    def log_weight(self, image: Float[Tensor, "batch channel height width"]) -> Tensor:
        """Log importance weight log p(x|z) + log p(z) - log q(z|x), in nats, shape (batch,)."""
        log_weight = self.likelihood.log_prob(image)
        for latent in self.latents:
            log_weight = log_weight + latent.log_p - latent.log_q
        return log_weight


def importance_weighted_bound(
    log_weights: Float[Tensor, "sample batch"],
) -> Float[Tensor, " batch"]:
    r"""Importance-weighted bound :math:`\log \frac1K \sum_k w_k \le \log p(x)`, nats per image.

    Source: Burda et al. 2016, Eq. 8. With K = 1 it is the one-sample estimate of the ELBO.
    """
    return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])
