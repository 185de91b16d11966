"""Evaluation of a model on a test split as one dictionary, written to files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from nvae_lightning.inference.evaluation import EvaluationModule
from nvae_lightning.inference.metrics import groups_of
from nvae_lightning.model import NVAE, DiscretizedLogisticMixtureLikelihood
from nvae_lightning.model.decoder import FirstGroup
from nvae_lightning.utilities import figures
from nvae_lightning.utilities.files import write_text


def measure(
    trainer: Trainer, module: EvaluationModule, datamodule: LightningDataModule
) -> dict[str, Any]:
    """Evaluate the test split; the names of the results end in their units.

    Raises:
        ValueError: If the trainer's limit leaves no image.
    """
    started = time.perf_counter()
    trainer.test(module, datamodule, verbose=False)
    found = {
        name.removeprefix("test/"): float(value)
        for name, value in trainer.callback_metrics.items()
    }
    if "nll" not in found:
        raise ValueError(
            f"trainer.limit_test_batches: got {trainer.limit_test_batches}, which leaves no batch "
            "to evaluate; set a larger number"
        )
    return {
        "nll_nats": found["nll"],
        "nll_bpd": found["nll_bpd"],
        "nll_standard_error": found["nll_standard_error"],
        "elbo_nats": found["elbo"],
        "elbo_bpd": found["bpd"],
        "distortion_nats": found["distortion"],
        "rate_nats": found["rate"],
        "rate_per_group": groups_of(found, "kl_group"),
        "active_channels": groups_of(found, "active_channels"),
        "num_images": int(found["num_images"]),
        "num_importance_samples": module.num_importance_samples,
        **{k: v for k, v in found.items() if k.startswith(("fid", "frechet_distance"))},
        "seconds": time.perf_counter() - started,
        "device": str(trainer.strategy.root_device),
        "num_devices": trainer.world_size,
    }


def correct_likelihood(model: NVAE) -> bool:
    """Correct the numerics of published weights in place; return whether they differed."""
    first = model.decoder.groups[0]
    assert isinstance(first, FirstGroup)
    changed, first.prior_std = first.prior_std != 1.0, 1.0
    if isinstance(model.likelihood, DiscretizedLogisticMixtureLikelihood):
        changed = changed or model.likelihood.published_tails
        model.likelihood.published_tails = False
    return changed


def write_results(results: dict[str, Any], model: NVAE, folder: Path) -> None:
    """Write ``evaluation.json`` and ``rate_per_group.png``."""
    figure = figures.rate_per_group(
        results["rate_per_group"],
        results["active_channels"],
        [scale for scale, _ in model.hierarchy.groups],
    )
    figures.write(figure, folder / "rate_per_group.png")
    write_text(folder / "evaluation.json", json.dumps(results, indent=2) + "\n")
