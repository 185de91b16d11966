"""Convert published weights: ``python -m nvae_lightning.convert checkpoint=… output=…``."""

from __future__ import annotations

from omegaconf import DictConfig

from nvae_lightning.cli.command import command, run
from nvae_lightning.model import NVAE, DiscretizedLogisticMixtureLikelihood
from nvae_lightning.published import convert_published


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
    nonfinite = config.allow_nonfinite
    model = convert_published(config.checkpoint, config.output, allow_nonfinite=nonfinite)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in '{config.output}'")
    print("Kept as the weights were trained:", *kept_numerics(model), sep="\n  ")


if __name__ == "__main__":
    run(main)
