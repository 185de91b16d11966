"""The history of the groups is saved in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nvae_lightning.training.callbacks import KLPerGroup


def reloaded(state: dict[str, Any], path: Path) -> KLPerGroup:
    """Load a state into another callback, through a checkpoint."""
    torch.save(state, path)
    callback = KLPerGroup()
    callback.load_state_dict(torch.load(path, weights_only=True))
    return callback


def test_history_survives_a_resume(tmp_path: Path) -> None:
    first = KLPerGroup()
    first.steps = [50, 100]
    first.history = {
        "rates": [[1.5, 20.0], [2.5, 10.0]],
        "balance": [[0.5, 1.5], [1.0, 1.0]],
        "active": [[0.0, 8.0], [4.0, 8.0]],
    }
    second = reloaded(first.state_dict(), tmp_path / "state")
    assert second.steps == first.steps
    assert second.history == first.history
    second.steps.append(150)
    for values in second.history.values():
        values.append([1.0, 2.0])
    assert reloaded(second.state_dict(), tmp_path / "state").history == second.history


def test_an_empty_history_is_restored(tmp_path: Path) -> None:
    callback = reloaded(KLPerGroup().state_dict(), tmp_path / "state")
    assert callback.steps == []
    assert callback.history == {"rates": [], "balance": [], "active": []}
