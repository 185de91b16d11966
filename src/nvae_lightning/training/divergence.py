"""Divergence of a training."""

from __future__ import annotations

from typing import Any

import torch

from nvae_lightning.training.module import NVAEModule


class DivergedError(RuntimeError):
    """Divergence of a training in spite of skipped steps and rollbacks."""


def describe_nonfinite(module: NVAEModule) -> str:
    """Name the places of NaN or infinite values on this rank, as near the cause as possible."""
    places = []
    terms = module.last_terms
    if terms is not None:
        groups = (~torch.isfinite(terms.rate).all(1)).nonzero().flatten().tolist()
        if groups:
            places.append(f"KL of group{'s' if len(groups) > 1 else ''} {_some(groups)}")
        if not torch.isfinite(terms.distortion).all():
            places.append("distortion")
    if not places:
        names = [
            name
            for name, parameter in module.named_parameters()
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
        ]
        places += [f"gradient of {_some(names)}"] if names else []
    return ", ".join(places)


def _some(items: list[Any]) -> str:
    return ", ".join(map(str, items[:3])) + (f" and {len(items) - 3} more" if items[3:] else "")
