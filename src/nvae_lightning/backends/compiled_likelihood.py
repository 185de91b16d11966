"""Likelihood whose log probabilities are compiled."""

from __future__ import annotations

from nvae_lightning.backends.compiler import compiled
from nvae_lightning.model.likelihood import (
    DiscretizedLogisticMixture,
    DiscretizedLogisticMixtureLikelihood,
    mixture_log_prob,
)


class CompiledMixture(DiscretizedLogisticMixture):
    """Mixture of logistics with compiled log probabilities."""

    log_prob_of_levels = staticmethod(compiled(dynamic=False)(mixture_log_prob))


class CompiledMixtureLikelihood(DiscretizedLogisticMixtureLikelihood):
    """Likelihood that gives such mixtures."""

    distribution = CompiledMixture
