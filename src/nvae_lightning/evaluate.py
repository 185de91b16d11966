"""Measure a trained model: ``python -m nvae_lightning.evaluate ckpt_path=…``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from nvae_lightning.backends import Compute
from nvae_lightning.cli.command import command, run
from nvae_lightning.cli.command_line import as_single_run
from nvae_lightning.cli.machine import check_precision, hide_warnings, keep_freed_memory
from nvae_lightning.cli.setting_types import check_seed, check_type
from nvae_lightning.cli.trained import trained_model, training_data
from nvae_lightning.inference.evaluation import EvaluationModule
from nvae_lightning.model import NVAE, DiscretizedLogisticMixtureLikelihood
from nvae_lightning.model.decoder import FirstGroup
from nvae_lightning.training.callbacks import EndRanks
from nvae_lightning.utilities import figures
from nvae_lightning.utilities.files import write_text
from nvae_lightning.utilities.signals import if_ended


def measure(
    config: DictConfig, model: NVAE, datamodule: LightningDataModule, trainer: Trainer
) -> dict[str, Any]:
    """Evaluate the test split and name the results in their units."""
    module = EvaluationModule(
        model,
        num_importance_samples=config.num_importance_samples,
        memory_budget=config.memory_budget and int(config.memory_budget),
    )
    started = time.perf_counter()
    trainer.test(module, datamodule, verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if "test/nll" not in found:
        raise ValueError(
            f"trainer.limit_test_batches: got {config.trainer.limit_test_batches}, which leaves "
            "nothing to evaluate; set a larger one"
        )
    others = ("fid", "frechet_distance")
    return {
        "nll_nats": found["test/nll"],
        "nll_bpd": found["test/nll_bpd"],
        "nll_standard_error": found["test/nll_standard_error"],
        "elbo_nats": found["test/elbo"],
        "elbo_bpd": found["test/bpd"],
        "distortion_nats": found["test/distortion"],
        "rate_nats": found["test/rate"],
        "rate_per_group": _by_group(found, "test/kl_group/"),
        "active_channels": _by_group(found, "test/active_channels/"),
        "num_images": int(found["test/num_images"]),
        "num_importance_samples": config.num_importance_samples,
        **{
            name.removeprefix("test/"): value
            for name, value in found.items()
            if name.removeprefix("test/").startswith(others)
        },
        "seconds": time.perf_counter() - started,
        "device": str(trainer.strategy.root_device),
        "num_devices": trainer.world_size,
    }


def _by_group(found: dict[str, float], prefix: str) -> list[float]:
    return [found[name] for name in sorted(found) if name.startswith(prefix)]


def correct_numerics(model: NVAE) -> bool:
    """Let published weights be evaluated by the correct likelihood; whether that is another."""
    first = model.decoder.groups[0]
    assert isinstance(first, FirstGroup)
    changed, first.prior_std = first.prior_std != 1.0, 1.0
    if isinstance(model.likelihood, DiscretizedLogisticMixtureLikelihood):
        changed = changed or model.likelihood.published_tails
        model.likelihood.published_tails = False
    return changed


@rank_zero_only
def report(results: dict[str, Any], model: NVAE, folder: Path) -> None:
    """Write ``evaluation.json`` and ``rate_per_group.png``, and print the chief results."""
    figure = figures.rate_per_group(
        results["rate_per_group"],
        results["active_channels"],
        [scale for scale, _ in model.hierarchy.groups],
    )
    figures.write(figure, folder / "rate_per_group.png")
    file = folder / "evaluation.json"
    write_text(file, json.dumps(results, indent=2) + "\n")
    print(
        f"NLL {results['nll_nats']:.2f} ± {results['nll_standard_error']:.2f} nats "
        f"({results['nll_bpd']:.4f} bits per dim, {results['num_importance_samples']} importance "
        f"samples), ELBO {results['elbo_nats']:.2f} nats, {results['num_images']:,} images"
    )
    print(f"written: '{file}' and rate_per_group.png")


@command("evaluate")
def main(config: DictConfig) -> float:
    """Evaluate one model on a test split and return its NLL in nats, for sweeps."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    keep_freed_memory()
    hide_warnings()
    check_seed(config.seed)
    check_type("num_importance_samples", config.num_importance_samples, int)
    check_type("memory_budget", config.memory_budget, int | float | None)
    check_type("both_likelihoods", config.both_likelihoods, bool)
    check_type("compile", config.compile, bool)
    seed_everything(config.seed, workers=True, verbose=False)
    ckpt_path = config.ckpt_path
    model = trained_model(config)
    Compute(compile=config.compile).apply(model)
    datamodule = training_data(config, model, ours=False)
    callbacks = [] if config.fid is None else [instantiate(config.fid, _convert_="all")]
    if_ended(f"'{run_dir / 'evaluation.json'}' is not written; give the same command again")
    check_precision("trainer.precision", config.trainer.precision, config.trainer.accelerator)
    trainer = instantiate(
        config.trainer,
        default_root_dir=str(run_dir),
        callbacks=[*callbacks, EndRanks()],
        _convert_="all",
    )
    with as_single_run(run_dir):
        results = {"ckpt_path": ckpt_path, **measure(config, model, datamodule, trainer)}
        if config.both_likelihoods and correct_numerics(model):
            for callback in callbacks:  # samples do not depend on it
                trainer.callbacks.remove(callback)  # pyright: ignore[reportAttributeAccessIssue]
            corrected = measure(config, model, datamodule, trainer)
            results["corrected"] = {
                name: value
                for name, value in corrected.items()
                if name.startswith(("nll", "elbo"))
            }
    report(results, model, run_dir)
    return results["nll_nats"]


if __name__ == "__main__":
    run(main)
