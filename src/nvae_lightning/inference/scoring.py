"""Anomaly scores of whole data modules, as tables, figures and AUROC."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from nvae_lightning.data import AllImages, ImageDataModule
from nvae_lightning.inference.anomaly import AnomalyScores, auroc
from nvae_lightning.objective import bits_per_dim
from nvae_lightning.utilities import figures
from nvae_lightning.utilities.files import whole_file, write_text


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
