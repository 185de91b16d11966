"""The rate of every latent group over the training, as the paper's Fig. 5b draws it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nvae_lightning.module import is_logging_step

_PREFIX = "train/kl_group/"


class KLPerGroup(Callback):
    """Write ``kl_per_group.png`` at the end of the training; its history survives a resume."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rates: list[list[float]] = []

    def state_dict(self) -> dict[str, Any]:
        """History so far, as plain numbers."""
        return {"steps": self.steps, "rates": self.rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.steps, self.rates = list(state_dict["steps"]), list(state_dict["rates"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Take what has been logged at this step, if anything has."""
        step = trainer.global_step
        if not is_logging_step(trainer, step) or step in self.steps[-1:]:
            return
        metrics = trainer.callback_metrics
        rates = [float(metrics[name]) for name in sorted(metrics) if name.startswith(_PREFIX)]
        self.steps.append(step)
        self.rates.append(rates)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        if not self.steps:
            return
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        num_groups = len(self.rates[0])
        colours = mpl.colormaps["viridis"]
        scale = Normalize(0, max(num_groups - 1, 1))
        marker = "o" if len(self.steps) == 1 else ""
        for group in range(num_groups):
            axes.plot(
                self.steps,
                [rates[group] for rates in self.rates],
                color=colours(scale(group)),
                linewidth=1.2,
                marker=marker,
            )
        axes.set(xlabel="training step", ylabel="KL per group (nats)")
        # KL starts hundreds of times higher than it ends, and flows' estimates may be negative.
        axes.set_yscale("symlog", linthresh=1.0)
        axes.grid(alpha=0.3)
        bar = figure.colorbar(
            ScalarMappable(scale, colours), ax=axes, ticks=MaxNLocator(integer=True)
        )
        bar.set_label("group, coarsest (0) to finest")
        FigureCanvasAgg(figure).print_png(Path(trainer.default_root_dir) / "kl_per_group.png")
