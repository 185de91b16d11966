"""How likely images are, and scores by which a hierarchical model tells foreign ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from nvae_lightning.inference.batches import ImageModule, Images
from nvae_lightning.model import NVAE, importance_weighted_bound

_MOST_KS = 8  # that are chosen if none are given


class AnomalyScores(ImageModule):
    r"""Log-likelihood and likelihood ratios of images, in nats.

    .. math::
        LLR^{>k} = L - L^{>k}

    where the bound :math:`L^{>k}` draws the k finest groups from their priors instead of the
    posterior: so much of the likelihood is owed to them. Foreign images have high ratios, as the
    coarse groups do not know them, even where simple textures make them likely.

    Source: Havtorn et al. 2021.

    Args:
        model: a trained one.
        ks: numbers k of finest groups; if None all, or eight of them.
        num_importance_samples: samples per image and bound.
        memory_budget: see :meth:`NVAE.log_weights`.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        model: NVAE,
        *,
        ks: Sequence[int] | None = None,
        num_importance_samples: int = 10,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(model)
        most = model.hierarchy.num_groups - 1
        if num_importance_samples < 1:
            raise ValueError(
                f"num_importance_samples must be at least 1, got {num_importance_samples}"
            )
        if ks is None:
            ks = torch.linspace(1, most, min(most, _MOST_KS)).round().int().tolist()
        for k in ks:
            if not 1 <= k <= most:
                raise ValueError(
                    f"k: got {k}, but the model has {most + 1} groups, of which at least one is "
                    f"inferred: give numbers from 1 to {most}"
                )
        self.model.eval()
        self.ks = list(ks)
        self.num_importance_samples = num_importance_samples
        self.memory_budget = memory_budget

    @property
    def names(self) -> list[str]:
        """Names of the scores, in their order."""
        return ["log_likelihood", *(f"llr_{k}" for k in self.ks)]

    def predict_step(
        self, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> Float[Tensor, "batch score"]:
        """Score a batch."""
        x = self._input(batch, "predict", dataloader_idx)
        whole = self._bound(x, self.model.hierarchy.num_groups)
        ratios = [whole - self._bound(x, self.model.hierarchy.num_groups - k) for k in self.ks]
        return torch.stack([whole, *ratios], 1)

    def _bound(self, x: Images, num_inferred: int) -> Float[Tensor, " batch"]:
        return importance_weighted_bound(
            self.model.log_weights(
                x,
                self.num_importance_samples,
                num_inferred=num_inferred,
                memory_budget=self.memory_budget,
            )
        )


def auroc(
    foreign: Float[Tensor, "count score"], known: Float[Tensor, "count_known score"]
) -> list[float]:
    """Area under the ROC curve of telling foreign images from known ones, by each score.

    Foreign ones are those of lower log-likelihood, the first score, or of higher ratios. 1 is
    perfect and 0.5 chance.
    """
    scores = torch.cat([foreign, known]).double()
    scores[:, 0] = -scores[:, 0]
    is_foreign = torch.arange(len(scores)) < len(foreign)
    areas = []
    for score in scores.unbind(1):
        # Ranks instead of nats, which torchmetrics would take for logits and saturate.
        _, ranks = score.unique(return_inverse=True)
        areas.append(float(binary_auroc(ranks.double() / len(ranks), is_foreign.int())))
    return areas
