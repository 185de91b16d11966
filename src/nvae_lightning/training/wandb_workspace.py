"""Panels at W&B for all that is logged; takes the package wandb-workspaces."""

from __future__ import annotations

import json
from pathlib import Path

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from nvae_lightning.utilities.files import write_text

_STEP = "trainer/global_step"  # as Lightning's logger names it
_TIME = "RelativeTime(Process)"


def build_workspace(entity: str, project: str, name: str) -> ws.Workspace:
    """Build a workspace of a project.

    Panels go by logged names, those of groups by a pattern: it fits models of any size.

    Args:
        entity: user or team.
        project: of the runs.
        name: of the workspace.
    """
    sections = {
        "Likelihood": [
            _lines("ELBO (nats per image)", "train/elbo", "val/elbo", "test/elbo"),
            _lines("bits per dim", "train/bpd", "val/bpd", "test/bpd"),
            _lines("distortion (nats)", "train/distortion", "val/distortion", "test/distortion"),
            _lines("rate (nats)", "train/rate", "val/rate", "test/rate"),
            wr.BarPlot(title="test NLL (nats per image)", metrics=["test/nll"]),
            wr.BarPlot(title="test NLL (bits per dim)", metrics=["test/nll_bpd"]),
            wr.BarPlot(title="FID", metrics=["test/fid"]),
        ],
        "KL per group": [
            _groups("KL, training (nats)", "train/kl_group", is_log=True),
            _groups("KL, validation and test (nats)", "(val|test)/kl_group", is_log=True),
            _pictures("group × step", "train/kl_heatmap"),
            _pictures("KL over the training", "train/kl_per_group"),
            wr.WeavePanelSummaryTable(table_name="val/groups"),
        ],
        "Balancing": [_groups("balancing factor", "train/kl_balance")],
        "Active channels": [
            _groups("active channels, training", "train/active_channels"),
            _groups("active channels, validation and test", "(val|test)/active_channels"),
        ],
        "Penalties and schedules": [
            _lines("β", "train/beta"),
            _lines("λ", "train/penalty_weight"),
            _lines("spectral penalty", "train/spectral"),
            _lines("penalty on scales of normalisation", "train/bn_scale"),
            wr.LinePlot(title="learning rate", x=_STEP, metric_regex="^lr-"),
        ],
        "Optimisation": [
            _lines("loss", "train/loss"),
            _lines("norm of the gradient", "train/grad_norm", is_log=True),
            _lines("norm of the weights", "train/weight_norm"),
            _lines("steps skipped", "train/skipped_steps"),
            _lines("rollbacks", "train/rollbacks", "train/diverged"),
        ],
        "Pictures": [
            _pictures("samples", "val/samples", "test/samples"),
            _pictures("reconstructions", "val/reconstructions", "test/reconstructions"),
            _pictures("temperatures", "test/temperatures"),
        ],
        "System and throughput": [
            _lines("images a second", "train/images_per_second"),
            _lines("peak memory (GiB)", "train/peak_memory_gib"),
            wr.BarPlot(title="sampling (ms per image)", metrics=["test/sampling_ms_per_image"]),
            # W&B's own measurements, which know of no steps.
            wr.LinePlot(title="GPU in use (%)", x=_TIME, y=["system/gpu.0.gpu"]),
            wr.LinePlot(title="GPU memory (%)", x=_TIME, y=["system/gpu.0.memoryAllocated"]),
        ],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=title, panels=list(panels), is_open=True)
            for title, panels in sections.items()
        ],
    )


def write_workspace(workspace: ws.Workspace, path: Path) -> None:
    """Write what would be saved at W&B as JSON."""
    text = json.dumps(workspace._spec, indent=2, ensure_ascii=False)
    write_text(path, text + "\n")


def save_workspace(workspace: ws.Workspace) -> None:
    """Save at W&B, which prints the address.

    Raises:
        ValueError: If W&B cannot be reached, knows no such project, or does not know the user.
    """
    try:
        workspace.save()
    except Exception as error:  # W&B's own are of many kinds
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"entity={workspace.entity} project={workspace.project}: W&B has not saved the "
            f"workspace ({reason}); log in by 'wandb login', sync a run of the project first, or "
            "set save=false"
        ) from error


def _lines(title: str, *names: str, is_log: bool = False) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=_STEP, y=list(names), log_y=is_log or None)


def _groups(title: str, prefix: str, *, is_log: bool = False) -> wr.LinePlot:
    pattern = f"^{prefix}/[0-9]+$"
    return wr.LinePlot(title=title, x=_STEP, metric_regex=pattern, log_y=is_log or None)


def _pictures(title: str, *names: str) -> wr.MediaBrowser:
    return wr.MediaBrowser(title=title, media_keys=list(names), num_columns=len(names))
