"""Fixtures that build synthetic runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from nvae_lightning.reporting import Run

MakeRun = Callable[..., Run]

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "run_dir": "/runs/0",
    "version": "0.1.0",
    "device": "CPU (one), 1 thread",
    "num_devices": 2,
    "num_importance_samples": 10,
    "choices": {"dataset": "image_folder", "model": "tiny", "experiment": "table4"},
    "dataset": {
        "batch_size": 4,
        "root": "images",
        "image": {"channels": 3, "size": 32, "bits": 8},
    },
    "model": {
        "hierarchy": {
            "channels": 8, "width": 0.5, "num_groups": [3, 9], "max_groups_per_scale": 5
        },
        "residual_posterior": True,
    },
    "penalty": {"weight": 0.01},
    "trainer": {"max_steps": 100, "precision": "32-true", "accumulate_grad_batches": 3},
    "callbacks": {"picture": {"folder": "/runs/0/pictures"}},
}  # fmt: skip


@pytest.fixture
def make_run() -> MakeRun:
    """Builder of finished runs from settings by dotted path and test metrics."""

    def make(
        name: str,
        settings: dict[str, Any] | None = None,
        metrics: dict[str, float] | None = None,
        *,
        rows: list[dict[str, float]] | None = None,
    ) -> Run:
        own = copy.deepcopy(SETTINGS)
        given = {"run_dir": f"/runs/{name}", **(settings or {})}
        own["callbacks"]["picture"]["folder"] = f"/runs/{name}/pictures"
        for path, value in given.items():
            *groups, key = path.split(".")
            group = own
            for part in groups:
                group = group.setdefault(part, {})
            group[key] = value
        test = {"step": 100.0, "test/nll": 5.0, "test/num_images": 20.0, **(metrics or {})}
        return Run(name, own, [test] if rows is None else rows)

    return make
