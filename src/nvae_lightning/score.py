"""Score how likely images are: ``python -m nvae_lightning.score ckpt_path=… images=FOLDER``."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from nvae_lightning.cli.building import build_inference_trainer
from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.setting_types import check_type, plain
from nvae_lightning.cli.trained import images_for, trained_model, training_data
from nvae_lightning.inference.anomaly import AnomalyScores, compare, draw_extremes, score


@command("score")
def main(config: DictConfig) -> None:
    """Score images, draw the most and the least likely, and compare them with a reference."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    check_type("k", config.k, list[int] | None)
    check_type("memory_budget", config.memory_budget, int | float | None)
    seed_everything(config.seed, workers=True, verbose=False)
    model = trained_model(config)
    module = AnomalyScores(
        model,
        ks=plain(config.k),
        num_importance_samples=config.num_importance_samples,
        memory_budget=config.memory_budget and int(config.memory_budget),
    )
    trainer = build_inference_trainer(config, run_dir, single=True)
    batch_size = config.dataset.batch_size or 64
    datamodule = images_for(config, model, "images", batch_size)
    scores = score(trainer, module, datamodule, run_dir / "scores.csv")
    draw_extremes(scores, datamodule, run_dir / "most_and_least_likely.png")
    print(
        f"log-likelihood {scores[:, 0].mean():.2f} nats on average, {len(scores):,} images\n"
        f"written: '{run_dir / 'scores.csv'}' and most_and_least_likely.png"
    )
    if config.reference is None:
        return
    if config.reference == "test":
        reference = training_data(config, model)
    else:
        reference = images_for(config, model, "reference", batch_size)
    known = score(trainer, module, reference, run_dir / "reference_scores.csv")
    areas = compare(scores, known, module, run_dir)
    print("AUROC " + ", ".join(f"{name} {area:.4f}" for name, area in areas.items()))
    print(f"written: '{run_dir / 'auroc.json'}', reference_scores.csv and histograms.png")


if __name__ == "__main__":
    run(main)
