"""States of the random number generators as tensors and plain values."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, NumPy's, torch's and the device's generators."""
    name, keys, position, *gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.tensor(np.asarray(keys).tolist()), position, *gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore(states: dict[str, Any], device: torch.device, rank: int) -> None:
    """Restore the first rank's states from :func:`capture`; other ranks draw other numbers."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    if rank:
        torch.manual_seed(torch.initial_seed() + rank)
