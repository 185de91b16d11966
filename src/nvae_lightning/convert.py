"""Convert published weights: ``python -m nvae_lightning.convert checkpoint=… output=…``."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from nvae_lightning.cli.command import command, run
from nvae_lightning.model import NVAE, DiscretizedLogisticMixtureLikelihood
from nvae_lightning.published import load_published


def kept_numerics(model: NVAE) -> list[str]:
    """List the options in which the model differs from our own models, with their effects."""
    kept = ["first_prior_std=1.01: the coarsest group's prior is N(0, 1.01²)"]
    if isinstance(model.likelihood, DiscretizedLogisticMixtureLikelihood):
        if model.image.bits == 8:
            kept.append("published_tails=true: level 254 also has the upper tail's probability")
        else:
            kept.append("published_tails=true: nearly the correct form below 8 bits")
        kept.append(
            "published_temperature=true: sampling divides pixels' scale by the temperature"
        )
    return kept


@command("convert")
def main(config: DictConfig) -> None:
    """Write one published checkpoint as safetensors and config.json."""
    output = Path(config.output)
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"output: '{output}' is not empty; name another folder")
    model = load_published(config.checkpoint, allow_nonfinite=config.allow_nonfinite)
    model.save_pretrained(output)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in '{config.output}'")
    print("Kept as the weights were trained:", *kept_numerics(model), sep="\n  ")


if __name__ == "__main__":
    run(main)
