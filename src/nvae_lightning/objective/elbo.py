"""The evidence lower bound and its units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nvae_lightning.model import Inference


@dataclass(frozen=True)
class ELBO:
    """The terms of the bound, in nats per image.

    Args:
        distortion: Negative log-likelihood, -log p(x | z).
        rate: KL of every latent group, coarsest first.
    """

    distortion: Float[Tensor, " batch"]
    rate: Float[Tensor, "group batch"]

    @property
    def value(self) -> Float[Tensor, " batch"]:
        """The bound: ``-(distortion + sum of rate) <= log p(x)`` in expectation."""
        return -(self.distortion + self.rate.sum(0))


def elbo(inference: Inference, x: Float[Tensor, "batch channel height width"]) -> ELBO:
    r"""Terms of :math:`E_q[\log p(x|z)] - \sum_l KL(q(z_l|x, z_{<l}) \| p(z_l|z_{<l}))`.

    Source: Vahdat & Kautz 2020, Eq. 1; one draw of z.
    """
    return ELBO(
        distortion=-inference.likelihood.log_prob(x),
        rate=torch.stack([latent.kl for latent in inference.latents]),
    )


def bits_per_dim(nats: Tensor | float, num_dims: int) -> Tensor | float:
    r"""Convert nats per image to bits per dim: :math:`nats / (D \ln 2)`."""
    return nats / (num_dims * math.log(2))
