"""The training objective: pure functions of an inference, in nats per image."""

from nvae_lightning.model import importance_weighted_bound
from nvae_lightning.objective.elbo import ELBO, bits_per_dim, elbo
from nvae_lightning.objective.kl import (
    KL,
    active_channels,
    balance_kl,
    balancing_factors,
    channel_rates,
    size_factor,
)
from nvae_lightning.objective.penalties import Penalty, SpectralPenalty, bn_scale_penalty
from nvae_lightning.objective.schedules import (
    annealed_penalty_weight,
    constant,
    kl_warmup,
    warmup_cosine,
)

__all__ = [
    "ELBO",
    "KL",
    "Penalty",
    "SpectralPenalty",
    "active_channels",
    "annealed_penalty_weight",
    "balance_kl",
    "balancing_factors",
    "bits_per_dim",
    "bn_scale_penalty",
    "channel_rates",
    "constant",
    "elbo",
    "importance_weighted_bound",
    "kl_warmup",
    "size_factor",
    "warmup_cosine",
]
