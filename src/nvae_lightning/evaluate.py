"""Evaluate a trained model: ``python -m nvae_lightning.evaluate ckpt_path=…``."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from nvae_lightning.backends import Compute
from nvae_lightning.cli.building import build_inference_trainer
from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.command_line import as_single_run
from nvae_lightning.cli.setting_types import check_type
from nvae_lightning.cli.trained import trained_models, training_data
from nvae_lightning.inference.evaluation import EvaluationModule
from nvae_lightning.inference.measurement import correct_likelihood, measure, write_results
from nvae_lightning.training.callbacks import EndRanks
from nvae_lightning.utilities.signals import if_ended


@command("evaluate")
def main(config: DictConfig) -> float:
    """Evaluate one model on a test split and return its NLL in nats, for sweeps."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    check_type("memory_budget", config.memory_budget, int | float | None)
    seed_everything(config.seed, workers=True, verbose=False)
    ckpt_path = config.ckpt_path
    models = trained_models(config)
    model = next(models)
    Compute(compile=config.compile).apply(model)
    datamodule = training_data(config, model, ours=False)
    settings = {
        "num_importance_samples": config.num_importance_samples,
        "memory_budget": config.memory_budget and int(config.memory_budget),
    }
    module = EvaluationModule(model, **settings)
    fid = [] if config.fid is None else [instantiate(config.fid, _convert_="all")]
    file = run_dir / "evaluation.json"
    if_ended(f"'{file}' is not written; run the same command again")
    trainer = build_inference_trainer(config, run_dir, *fid, EndRanks())
    with as_single_run(run_dir):
        results = {"ckpt_path": ckpt_path, **measure(trainer, module, datamodule)}
        other = None
        if (latest := next(models, None)) is not None:
            other, model = "latest", latest
            Compute(compile=config.compile).apply(model)
        elif config.both_likelihoods and correct_likelihood(model):
            other = "corrected"
        if other is not None:
            for callback in fid:
                trainer.callbacks.remove(callback)  # pyright: ignore[reportAttributeAccessIssue]
            module = EvaluationModule(model, **settings)
            found = measure(trainer, module, datamodule)
            results[other] = {k: v for k, v in found.items() if k.startswith(("nll", "elbo"))}
    if trainer.is_global_zero:
        write_results(results, model, run_dir)
        print(
            f"NLL {results['nll_nats']:.2f} ± {results['nll_standard_error']:.2f} nats "
            f"({results['nll_bpd']:.4f} bits per dim, {config.num_importance_samples} importance "
            f"samples), ELBO {results['elbo_nats']:.2f} nats, {results['num_images']:,} images"
        )
        if "latest" in results:
            latest = results["latest"]
            print(
                "these are the averaged weights; the latest: "
                f"NLL {latest['nll_nats']:.2f} nats, ELBO {latest['elbo_nats']:.2f} nats"
            )
        print(f"written: '{file}' and rate_per_group.png")
    return results["nll_nats"]


if __name__ == "__main__":
    run(main)
