"""Model cards: the README of a saved model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from nvae_lightning.model import NVAE
from nvae_lightning.utilities.plain_data import read_json

_CARD = """\
---
library_name: nvae-lightning
tags:
- nvae
- vae
---

# NVAE

A deep hierarchical variational autoencoder of images
([Vahdat & Kautz, NeurIPS 2020](https://arxiv.org/abs/2007.03898)), trained with nvae_lightning.

```python
from nvae_lightning.model import NVAE

model = NVAE.from_pretrained("NAME OF THIS REPOSITORY")
images = model.sample(16, temperature=0.7).mean  # {shape}, in [0, 1]
nats = model.log_likelihood(images, num_samples=100)  # images on the levels of [0, 1]
```

## Settings

{settings}

## Measured

{measured}
"""


def model_card(model: NVAE, evaluation: Mapping[str, Any] | str | Path | None = None) -> str:
    """Write the card of a model: its settings and its measured figures.

    Args:
        model: Model to describe.
        evaluation: Figures by name, or path of an ``evaluation.json``. Only single numbers and
            texts are shown.

    Raises:
        ValueError: If the file is missing or contains no figures.
    """
    image, hierarchy = model.image, model.hierarchy
    settings: dict[str, object] = {
        "image": f"{image.size}x{image.size}, {image.channels} channels, {image.bits} bits",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }
    for k, scale in enumerate(hierarchy.scales):
        side = image.padded_size // scale.downsample
        groups = f"{scale.num_groups} groups, {scale.channels} channels"
        settings[f"scale {k}: {side}x{side}"] = groups
    settings["latent channels"] = hierarchy.latent_channels
    settings |= {
        f"`{name}`": json.dumps(value)
        for name, value in model.architecture.items()
        if name not in ("image", "hierarchy")
    }
    figures = _figures(evaluation or {})
    return _CARD.format(
        shape=(16, image.channels, image.size, image.size),
        settings=_table(settings),
        measured=_table(figures) if figures else "No figures were given.",
    )


def _table(rows: Mapping[str, object]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _figures(evaluation: Mapping[str, Any] | str | Path) -> dict[str, str]:
    measured = evaluation
    if not isinstance(evaluation, Mapping):
        try:
            measured = read_json(evaluation)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"'{evaluation}' contains no figures ({reason})") from error
        if not isinstance(measured, dict):
            raise ValueError(f"'{evaluation}' contains no figures (it is not a JSON object)")
    assert isinstance(measured, Mapping)
    figures = {}
    for name, value in measured.items():
        value = value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value
        if isinstance(value, Real | str):
            is_whole = isinstance(value, Integral | str)
            figures[_cell(name)] = _cell(str(value) if is_whole else f"{value:.5g}")
    return figures


def _cell(text: str) -> str:
    """Escape text for a table."""
    return " ".join(text.split()).replace("|", r"\|")
