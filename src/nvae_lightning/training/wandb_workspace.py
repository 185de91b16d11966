"""A W&B workspace with panels for all logged values; requires wandb-workspaces."""

from __future__ import annotations

import json
from pathlib import Path

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from nvae_lightning.utilities.files import write_text

_STEP = "trainer/global_step"  # the name that Lightning's logger uses
_TIME = "RelativeTime(Process)"


def build_workspace(entity: str, project: str, name: str) -> ws.Workspace:
    """Build the workspace of a project.

    Panels refer to logged names and, for groups, to patterns, so they suit models of any size.

    Args:
        entity: User or team.
        project: Project of the runs.
        name: Name of the workspace.
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
            _pictures("KL during training", "train/kl_per_group"),
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
            _lines("batch-norm scale penalty", "train/bn_scale"),
            wr.LinePlot(title="learning rate", x=_STEP, metric_regex="^lr-"),
        ],
        "Optimisation": [
            _lines("loss", "train/loss"),
            _lines("gradient norm", "train/grad_norm", is_log=True),
            _lines("weight norm", "train/weight_norm"),
            _lines("skipped steps", "train/skipped_steps"),
            _lines("rollbacks", "train/rollbacks", "train/diverged"),
        ],
        "Pictures": [
            _pictures("samples", "val/samples", "test/samples"),
            _pictures("reconstructions", "val/reconstructions", "test/reconstructions"),
            _pictures("temperatures", "test/temperatures"),
        ],
        "System and throughput": [
            _lines("images per second", "train/images_per_second"),
            _lines("peak memory (GiB)", "train/peak_memory_gib"),
            # Measured by W&B itself, by time instead of steps.
            wr.LinePlot(title="GPU utilisation (%)", x=_TIME, y=["system/gpu.0.gpu"]),
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
    """Write the workspace as JSON in the format sent to W&B."""
    text = json.dumps(workspace._spec, indent=2, ensure_ascii=False)
    write_text(path, text + "\n")


def save_workspace(workspace: ws.Workspace) -> None:
    """Save the workspace to W&B, which prints its address.

    Raises:
        ValueError: If W&B is unreachable, or the project or user is unknown.
    """
    try:
        workspace.save()
    except Exception as error:  # W&B raises many types
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"entity={workspace.entity} project={workspace.project}: W&B did not save the "
            f"workspace ({reason}); log in with 'wandb login', sync a run of the project "
            "first, or set save=false"
        ) from error


def _lines(title: str, *names: str, is_log: bool = False) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=_STEP, y=list(names), log_y=is_log or None)


def _groups(title: str, prefix: str, *, is_log: bool = False) -> wr.LinePlot:
    pattern = f"^{prefix}/[0-9]+$"
    return wr.LinePlot(title=title, x=_STEP, metric_regex=pattern, log_y=is_log or None)


def _pictures(title: str, *names: str) -> wr.MediaBrowser:
    return wr.MediaBrowser(title=title, media_keys=list(names), num_columns=len(names))
