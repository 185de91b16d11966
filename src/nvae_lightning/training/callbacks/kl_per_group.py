"""Rate, balancing factor and active channels of every latent group over the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from nvae_lightning.inference.metrics import groups_of
from nvae_lightning.training.callbacks.pictures import log_picture
from nvae_lightning.training.module import NVAEModule, is_logging_step
from nvae_lightning.utilities import figures

# Logged names by the keys of the history.
_LOGGED = {"rates": "kl_group", "balance": "kl_balance", "active": "active_channels"}


class KLPerGroup(Callback):
    """Draw ``kl_per_group.png`` and ``kl_heatmap.png`` after every validation and after training.

    Loggers receive them as ``train/kl_per_group`` and ``train/kl_heatmap``, and W&B a table of the
    latest values as ``val/groups``. Checkpoints contain the history.

    Attributes:
        steps: Logging steps so far.
        history: Values of all groups at each of these steps, by name.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.history: dict[str, list[list[float]]] = {name: [] for name in _LOGGED}
        self._num_drawn = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the history as tensors, which are smaller than lists."""
        return {
            "steps": torch.tensor(self.steps),
            **{name: torch.tensor(values) for name, values in self.history.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self.steps = state_dict["steps"].tolist()
        self.history = {name: state_dict[name].tolist() for name in _LOGGED}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Append the values of a logging step."""
        step = trainer.global_step
        if not is_logging_step(trainer, step) or step in self.steps[-1:]:
            return
        self.steps.append(step)
        for name, logged in _LOGGED.items():
            self.history[name].append(_values(trainer, f"train/{logged}"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, and log the table."""
        if not trainer.sanity_checking:
            self._draw(trainer, pl_module)
            self._log_table(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the whole training."""
        self._draw(trainer, pl_module)

    @rank_zero_only
    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(self.steps) == self._num_drawn:
            return
        self._num_drawn = len(self.steps)
        assert isinstance(pl_module, NVAEModule)
        hierarchy = pl_module.model.hierarchy
        heat_maps = figures.heat_maps_per_group(
            self.steps,
            **self.history,
            scale_of_group=[scale for scale, _ in hierarchy.groups],
            latent_channels=hierarchy.latent_channels,
        )
        lines = figures.lines_per_group(self.steps, self.history["rates"])
        for name, figure in (("kl_per_group", lines), ("kl_heatmap", heat_maps)):
            path = Path(trainer.default_root_dir) / f"{name}.png"
            figures.write(figure, path)
            log_picture(trainer, f"train/{name}", path)

    @rank_zero_only
    def _log_table(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.steps:
            return
        assert isinstance(pl_module, NVAEModule)
        scales = [scale for scale, _ in pl_module.model.hierarchy.groups]
        columns = {
            "group": list(range(len(scales))),
            "scale": scales,
            "KL (nats)": _values(trainer, "val/kl_group"),
            "balancing factor": self.history["balance"][-1],  # known in training only
            "active channels": _values(trainer, "val/active_channels"),
        }
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("val/groups", list(columns), rows, step=trainer.global_step)


def _values(trainer: Trainer, name: str) -> list[float]:
    # One synchronisation instead of one per group.
    return torch.stack(groups_of(trainer.callback_metrics, name)).tolist()
