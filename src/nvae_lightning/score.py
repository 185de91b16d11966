"""How likely images are: ``python -m nvae_lightning.score ckpt_path=… images=FOLDER``."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.machine import check_precision, hide_warnings, keep_freed_memory
from nvae_lightning.cli.setting_types import check_seed, check_type, check_types
from nvae_lightning.cli.trained import images_for, trained_model, training_data
from nvae_lightning.data import AllImages, ImageDataModule
from nvae_lightning.inference.anomaly import AnomalyScores, auroc
from nvae_lightning.model import NVAE
from nvae_lightning.objective import bits_per_dim
from nvae_lightning.utilities import figures
from nvae_lightning.utilities.files import whole_file, write_text


def score(
    trainer: Trainer, module: AnomalyScores, datamodule: ImageDataModule, csv_file: Path
) -> Tensor:
    """Score all images of a data module and write them to a table."""
    datamodule.prepare_data()
    datamodule.setup("test")
    batches = trainer.predict(module, datamodule)
    if not batches:
        raise ValueError(
            f"trainer.limit_predict_batches: got {trainer.limit_predict_batches}, which leaves "
            "nothing to score; set a larger one"
        )
    scores = torch.cat([batch for batch in batches if isinstance(batch, Tensor)]).cpu()
    names = datamodule.names if isinstance(datamodule, AllImages) else range(len(scores))
    names = names[: len(scores)]
    write_table(csv_file, names, module, scores)
    return scores


def write_table(
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


def reference_of(config: DictConfig, model: NVAE) -> ImageDataModule:
    """Return the images of a folder, or those of the training's test split."""
    if config.reference != "test":
        return images_for(config, model, config.reference, config.dataset.batch_size or 64)
    return training_data(config, model)


@command("score")
def main(config: DictConfig) -> None:
    """Score images, draw the most and the least likely, and tell them from a reference."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    keep_freed_memory()
    hide_warnings()
    ks: Any = OmegaConf.to_container(config.k) if OmegaConf.is_config(config.k) else config.k
    check_seed(config.seed)
    check_types(config)
    check_type("k", ks, list[int] | None)
    check_type("images", config.images, str)
    check_type("reference", config.reference, str | None)
    check_type("num_importance_samples", config.num_importance_samples, int)
    check_type("memory_budget", config.memory_budget, int | float | None)
    seed_everything(config.seed, workers=True, verbose=False)
    model = trained_model(config)
    module = AnomalyScores(
        model,
        ks=ks,
        num_importance_samples=config.num_importance_samples,
        memory_budget=config.memory_budget and int(config.memory_budget),
    )
    check_precision("trainer.precision", config.trainer.precision, config.trainer.accelerator)
    trainer = instantiate(config.trainer, default_root_dir=str(run_dir), _convert_="all")
    if trainer.world_size > 1:
        raise ValueError(
            f"trainer.devices: got {trainer.world_size} in all, but images are scored by one; set "
            "trainer.devices=1 trainer.num_nodes=1 trainer.strategy=auto"
        )
    datamodule = images_for(config, model, config.images, config.dataset.batch_size or 64)
    scores = score(trainer, module, datamodule, run_dir / "scores.csv")

    def shown(indices: Tensor) -> Tensor:
        return datamodule.to_input(datamodule.test_set.__getitems__(indices.tolist()), train=False)

    figure = figures.most_and_least_likely(shown, scores[:, 0], binarized=datamodule.binarize)
    figures.write(figure, run_dir / "most_and_least_likely.png")
    likelihood = scores[:, 0].mean()
    print(f"log-likelihood {likelihood:.2f} nats on average, {len(scores):,} images")
    print(f"written: '{run_dir / 'scores.csv'}' and most_and_least_likely.png")
    if config.reference is None:
        return
    reference = reference_of(config, model)
    known = score(trainer, module, reference, run_dir / "reference_scores.csv")
    areas = auroc(scores, known)
    columns = {
        name: (scores[:, index], known[:, index]) for index, name in enumerate(module.names)
    }
    figure = figures.histograms(columns, areas, ("images", "reference"))
    figures.write(figure, run_dir / "histograms.png")
    results = {
        "auroc": dict(zip(module.names, areas, strict=True)),
        "num_images": len(scores),
        "num_reference_images": len(known),
        "num_importance_samples": config.num_importance_samples,
    }
    write_text(run_dir / "auroc.json", json.dumps(results, indent=2) + "\n")
    print("AUROC " + ", ".join(f"{k} {v:.4f}" for k, v in results["auroc"].items()))
    print(f"written: '{run_dir / 'auroc.json'}', reference_scores.csv and histograms.png")


if __name__ == "__main__":
    run(main)
