"""KL terms of the loss: warm-up, balancing between groups, and their diagnostics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nvae_lightning.model import Hierarchy, Latent
from nvae_lightning.model.normalization import mean_over_ranks
from nvae_lightning.objective.schedules import kl_warmup


def size_factor(hierarchy: Hierarchy, growth: float = 4.0) -> Float[Tensor, " group"]:
    r"""Size factor of every group, coarsest first: :math:`a_l \propto growth^k / n_k`, minimum 1.

    k is the index of the group's scale (0 for the coarsest) and n_k the number of groups in it.
    ``growth=4`` scales with the number of latent variables, 2 with the side of their map, and 1
    only with the number of groups.

    Source: Vahdat & Kautz 2020, Sec. A; the published settings divide by n_k.

    Raises:
        ValueError: If the growth is not positive, or a factor is not finite.
    """
    if not growth > 0.0:
        raise ValueError(f"kl.size_factor.growth must be positive, got {growth}")
    factors = torch.tensor(
        [growth**k / scale.num_groups for k, scale in hierarchy.groups],
        device="cpu",  # also for models on the meta device, because the check reads values
    )
    factors = factors / factors.min()
    if not torch.isfinite(factors).all():
        raise ValueError(
            f"kl.size_factor.growth: got {growth}, but the factors must be finite; "
            "choose a value closer to 1"
        )
    return factors


def balancing_factors(
    rate: Float[Tensor, "group batch"], size_factor: Float[Tensor, " group"]
) -> Float[Tensor, " group"]:
    r"""Balancing factors :math:`\gamma_l \propto (E|KL_l| + 0.01) / a_l`, their mean 1.

    No gradient flows through the factors. The expectation is over the batches of all ranks.
    Groups with a small KL are penalised less, so that none becomes inactive early in training.

    Source: Vahdat & Kautz 2020, Sec. A, which says "proportional" to the size, although the
    published settings use the inverse.
    """
    raw = (mean_over_ranks(rate.detach().abs().mean(1)) + 0.01) / size_factor
    return raw / raw.mean()


def balance_kl(
    rate: Float[Tensor, "group batch"],
    size_factor: Float[Tensor, " group"] | None,
    beta: float | Float[Tensor, ""],
) -> Float[Tensor, " batch"]:
    r"""KL term of the loss, nats per image: :math:`\beta \sum_l \gamma_l KL_l`.

    Balancing is part of the warm-up: for ``beta`` = 1 the term is the plain sum.

    Args:
        rate: KL per group and image.
        size_factor: Size factor of every group; None for no balancing.
        beta: Weight of the KL term; a tensor avoids synchronisation with the device.
    """
    if size_factor is not None and (isinstance(beta, Tensor) or beta < 1.0):
        factors = balancing_factors(rate, size_factor)
        if isinstance(beta, Tensor):
            factors = torch.where(beta < 1.0, factors, 1.0)
        rate = factors[:, None] * rate
    return beta * rate.sum(0)


def channel_rates(latent: Latent) -> Float[Tensor, " channel"]:
    """Return the KL of each channel, averaged over the batch and space, in nats."""
    return latent.kl_map.mean((0, 2, 3))


def active_channels(
    rates: Float[Tensor, " channel"], threshold: int | float = 0.1
) -> Int[Tensor, ""]:
    """Count the channels whose KL, averaged over batch and space, is above ``threshold`` nats.

    Source: Vahdat & Kautz 2020, footnote 5.
    """
    return (rates > threshold).sum()


@dataclass(frozen=True)
class KL:
    """Weights of the KL terms in the loss; the defaults are the paper's.

    Args:
        beta: Schedule of the weight of the KL term, ``beta(step, total_steps)``.
        size_factor: Size factors of the groups of a hierarchy; None for no balancing.

    Raises:
        ValueError: If a number of the schedule is out of range.
    """

    beta: Callable[[int, int], float] = kl_warmup
    size_factor: Callable[[Hierarchy], Tensor] | None = size_factor

    def __post_init__(self) -> None:
        self.beta(0, 1)  # checks its arguments before the training starts
