"""Anomaly scores of images, as tables, figures and AUROC."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from nvae_lightning.data import AllImages, ImageDataModule
from nvae_lightning.inference.batches import ImageModule, Images
from nvae_lightning.model import NVAE, importance_weighted_bound
from nvae_lightning.objective import bits_per_dim
from nvae_lightning.utilities import figures
from nvae_lightning.utilities.files import whole_file, write_text
from nvae_lightning.utilities.image import require_int

_MOST_KS = 8  # chosen by default


class AnomalyScores(ImageModule):
    r"""Log-likelihood and likelihood ratios of images, in nats.

    .. math::
        LLR^{>k} = L - L^{>k}

    where the bound :math:`L^{>k}` draws the k finest groups from their priors instead of the
    posterior, so the ratio is their share of the likelihood. Foreign images have high ratios, as
    the coarse groups do not fit them, even if simple textures make them likely.

    Source: Havtorn et al. 2021.

    Args:
        model: Trained model.
        ks: Numbers k of finest groups; by default up to eight, evenly spaced.
        num_importance_samples: Samples per image and bound.
        memory_budget: See :meth:`NVAE.log_weights`.

    Raises:
        ValueError: If a number is out of range.
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
        require_int("num_importance_samples", num_importance_samples, 1)
        if ks is None:
            ks = torch.linspace(1, most, min(most, _MOST_KS)).round().int().tolist()
        for k in ks:
            if not 1 <= k <= most:
                raise ValueError(
                    f"k: got {k}, but at least one of the model's {most + 1} groups must be "
                    f"inferred; give numbers from 1 to {most}"
                )
        self.model.eval()
        self.ks = list(ks)
        self.num_importance_samples = num_importance_samples
        self.memory_budget = memory_budget

    @property
    def names(self) -> list[str]:
        """Names of the scores, in order."""
        return ["log_likelihood", *(f"llr_{k}" for k in self.ks)]

    def predict_step(
        self, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> Float[Tensor, "batch score"]:
        """Return the scores of a batch."""
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
    """Return each score's area under the ROC curve for detecting foreign images.

    A lower log-likelihood (the first score) or a higher ratio counts as foreign. 1 is perfect and
    0.5 is chance.
    """
    scores = torch.cat([foreign, known]).double()
    scores[:, 0] = -scores[:, 0]
    is_foreign = torch.arange(len(scores)) < len(foreign)
    areas = []
    for score in scores.unbind(1):
        # Ranks instead of nats: torchmetrics would treat nats as logits, which saturate.
        _, ranks = score.unique(return_inverse=True)
        areas.append(float(binary_auroc(ranks.double() / len(ranks), is_foreign.int())))
    return areas


def score(
    trainer: Trainer, module: AnomalyScores, datamodule: ImageDataModule, file: Path
) -> Tensor:
    """Score all images of a data module and write the scores to a table.

    Raises:
        ValueError: If the trainer's limit leaves no image.
    """
    datamodule.prepare_data()
    datamodule.setup("test")
    batches = trainer.predict(module, datamodule)
    if not batches:
        raise ValueError(
            f"trainer.limit_predict_batches: got {trainer.limit_predict_batches}, which leaves no "
            "batch to score; set a larger number"
        )
    scores = torch.cat([batch for batch in batches if isinstance(batch, Tensor)]).cpu()
    names = datamodule.names if isinstance(datamodule, AllImages) else range(len(scores))
    _write_table(file, names[: len(scores)], module, scores)
    return scores


def _write_table(
    path: Path, names: Sequence[object], module: AnomalyScores, scores: Tensor
) -> None:
    """Write a row per image: its name, log-likelihood in nats, bits per dim, and LLR>k."""
    num_dims = module.model.image.num_dims
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        first, *ratios = module.names
        writer.writerow(["image", first, "bpd", *ratios])
        for name, (likelihood, *values) in zip(names, scores.tolist(), strict=True):
            writer.writerow([name, likelihood, bits_per_dim(-likelihood, num_dims), *values])


def draw_extremes(scores: Tensor, datamodule: ImageDataModule, file: Path) -> None:
    """Draw the most and the least likely images."""

    def images(indices: Tensor) -> Tensor:
        return datamodule.to_input(datamodule.test_set.__getitems__(indices.tolist()), train=False)

    figure = figures.most_and_least_likely(images, scores[:, 0], binarized=datamodule.binarize)
    figures.write(figure, file)


def compare(
    scores: Tensor, reference: Tensor, module: AnomalyScores, folder: Path
) -> dict[str, float]:
    """Return the AUROC of each score by its name; write ``auroc.json`` and ``histograms.png``."""
    areas = auroc(scores, reference)
    columns = {
        name: (scores[:, index], reference[:, index]) for index, name in enumerate(module.names)
    }
    figure = figures.histograms(columns, areas, ("images", "reference"))
    figures.write(figure, folder / "histograms.png")
    found = dict(zip(module.names, areas, strict=True))
    results = {
        "auroc": found,
        "num_images": len(scores),
        "num_reference_images": len(reference),
        "num_importance_samples": module.num_importance_samples,
    }
    write_text(folder / "auroc.json", json.dumps(results, indent=2) + "\n")
    return found
