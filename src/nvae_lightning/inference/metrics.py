"""The metrics of training, validation and test, in one place.

A new metric is a field of :class:`Statistics`, set in :meth:`Statistics.of`, and a line of
:func:`metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nvae_lightning.model import Inference
from nvae_lightning.objective import ELBO, active_channels, bits_per_dim, channel_rates


class Statistics(NamedTuple):
    """Means over images, in nats, from which all metrics follow.

    They are averaged over batches and ranks before the metrics are computed, because the number of
    active channels of a split is not the mean over its batches.
    """

    distortion: Float[Tensor, ""]
    rate: Float[Tensor, " group"]
    channel_rates: Float[Tensor, "group channel"]

    @classmethod
    def of(cls, inference: Inference, terms: ELBO) -> Statistics:
        """Average over a batch."""
        per_channel = [channel_rates(latent) for latent in inference.latents]
        return cls(
            terms.distortion.detach().mean(),
            terms.rate.detach().mean(1),
            torch.stack(per_channel).detach(),
        )


def metrics(statistics: Statistics, num_dims: int) -> dict[str, Tensor]:
    """Return the value of every metric by its name, without the stage.

    Args:
        statistics: Means over a batch, or over a split.
        num_dims: Number of dimensions of an image, for bits per dim.
    """
    rate = statistics.rate.sum()
    bound = -(statistics.distortion + rate)
    active = [active_channels(rates).float() for rates in statistics.channel_rates]
    return {
        "elbo": bound,
        "bpd": torch.as_tensor(bits_per_dim(-bound, num_dims)),
        "distortion": statistics.distortion,
        "rate": rate,
        **by_group("kl_group", statistics.rate),
        **by_group("active_channels", torch.stack(active)),
    }


def groups_of(found: Mapping[str, Any], name: str) -> list[Any]:
    """Return the values of ``name/00`` and so on, coarsest first."""
    return [found[key] for key in sorted(found) if key.removeprefix(f"{name}/").isdecimal()]


def by_group(name: str, values: Float[Tensor, " group"]) -> dict[str, Tensor]:
    """Name the values of the groups, coarsest first, as ``name/00``."""
    return {f"{name}/{index:02d}": value for index, value in enumerate(values.unbind())}
