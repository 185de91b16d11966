"""Tab: runs side by side, while they train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from nvae_lightning.data.image_formats import is_image, open_image
from nvae_lightning.explorer import plots
from nvae_lightning.explorer.widgets import answer, plot_box
from nvae_lightning.inference.metrics import groups_of
from nvae_lightning.reporting import Run
from nvae_lightning.reporting.run import shown

_SECONDS = 5  # between refreshes
_MOST_SHOWN = 4  # runs, at first
_MOST_SETTINGS = 30
#: Settings that name the run itself, and those that repeat others.
_LEFT_OUT = (
    "hydra",
    "run_dir",
    "run_id",
    "dirpath",
    "save_dir",
    "overrides",
    "module",
    "_partial_",
)


@dataclass(frozen=True)
class Runs:
    """Runs below a folder.

    Args:
        folder: Folder; nothing outside it is read.
        find: Function that returns the folders of the runs in a folder.
        load: Function that loads a run, given its folder and its name.
    """

    folder: Path
    find: Callable[[Path], Sequence[Path]]
    load: Callable[[Path, str], Run]

    def paths(self) -> dict[str, Path]:
        """Return the folder of every run by its name."""
        root = self.folder.resolve()
        found = [path.resolve() for path in self.find(self.folder)]
        inside = [path for path in found if path.is_relative_to(root)]
        return {str(path.relative_to(root.parent)): path for path in inside}

    def stamps(self) -> list[tuple[str, int]]:
        """Return the times at which the files of all runs were written."""
        files = [p / f for p in self.paths().values() for f in ("metrics.csv", "samples.png")]
        return [(str(file), file.stat().st_mtime_ns) for file in files if file.is_file()]

    def chosen(self, names: Sequence[str]) -> dict[str, tuple[Path, Run]]:
        """Load some runs; names without a run are left out.

        Raises:
            ValueError: If the files of one are damaged.
        """
        paths = self.paths()
        return {n: (paths[n], self.load(paths[n], n)) for n in names if n in paths}


def differing(runs: Sequence[Run]) -> str:
    """Return a table of the settings that differ, in Markdown; empty if none do."""
    flat = [dict(_flat(run.settings)) for run in runs]
    names = sorted({name for settings in flat for name in settings})
    rows = [(f"`{name}`", *(shown(each.get(name)) for each in flat)) for name in names]
    rows = [row for row in rows if len({*row[1:]}) > 1]
    if not rows:
        return ""
    header = [("setting", *(run.name for run in runs)), ("---",) * (len(runs) + 1)]
    lines = [*header, *rows[:_MOST_SETTINGS]]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in lines)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in settings.items():
        if key in _LEFT_OUT:
            continue
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def bounds(run: Run) -> dict[str, plots.Curve]:
    """Return steps and values of the bound in training and, if any, in validation."""
    found: dict[str, plots.Curve] = {}
    for stage in ("train", "val"):
        rows = [row for row in run.rows if f"{stage}/elbo" in row]
        if rows or stage == "train":
            steps = [row["step"] for row in rows]
            found[stage] = (steps, [row[f"{stage}/elbo"] for row in rows])
    return found


def state(run: Run) -> str:
    """Describe how far a run is."""
    ending = "diverged" if run.has_diverged else "finished" if run.is_finished else "training"
    return f"{run.name}: {run.num_steps:,} steps, {ending}"


def side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray | None:
    """Place pictures side by side on white; None if there are none."""
    if not pictures:
        return None
    height = max(len(each) for each in pictures)
    padded = [
        np.pad(each, ((0, height - len(each)), (0, 8), (0, 0)), constant_values=255)
        for each in pictures
    ]
    return np.concatenate(padded, axis=1)


def samples(folder: Path, root: Path) -> np.ndarray | None:
    """Read the samples in a run's folder; None if there are none."""
    file = (folder / "samples.png").resolve()
    if not (file.is_file() and is_image(file.name) and file.is_relative_to(root.resolve())):
        return None
    with open_image(file.read_bytes(), file.name) as image:
        return np.asarray(image.convert("RGB"))


def compare(
    runs: Runs, names: Sequence[str]
) -> tuple[str, str, np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Load runs and draw them.

    Returns:
        States, settings that differ, curves of the bound, heat maps of the KL per group, samples.

    Raises:
        ValueError: If the files of a run are damaged.
    """
    found = runs.chosen(names)
    loaded = [run for _, run in found.values()]
    maps = {}
    for run in loaded:
        if logged := [row for row in run.rows if "train/kl_group/00" in row]:
            values = [groups_of(row, "train/kl_group") for row in logged]
            maps[run.name] = ([row["step"] for row in logged], values)
    pictures = [samples(path, runs.folder) for path, _ in found.values()]
    curves = {run.name: bounds(run) for run in loaded}
    return (
        "\n\n".join(map(state, loaded)) or f"No run is chosen of those in `{runs.folder}`.",
        differing(loaded),
        plots.curves(curves, "bound (nats per image)") if loaded else None,
        plots.heat_maps(maps) if maps else None,
        side_by_side([pixels for pixels in pictures if pixels is not None]),
    )


def build(runs: Runs, page: gr.Blocks) -> None:
    """Build the tab."""
    names = [*runs.paths()]
    chosen = gr.Dropdown(names, value=names[:_MOST_SHOWN], multiselect=True, label="Runs")
    text = gr.Markdown()
    with gr.Row():
        bound = plot_box("Bound (solid: training, dashed: validation)", min_width=320)
        maps = plot_box("KL per group", min_width=320)
    pictures = plot_box("Samples, in the order of the runs")
    gr.Markdown("Settings that differ:")
    table = gr.Markdown(elem_classes="differing")
    timer = gr.Timer(_SECONDS)

    seen = gr.State()

    def refresh(names: list[str], seen: object) -> tuple[Any, ...]:
        now = (names, runs.stamps())
        if now == seen:  # nothing to draw again
            return (gr.skip(),) * 7
        return now, gr.Dropdown([*runs.paths()]), *compare(runs, names or [])

    outputs = [seen, chosen, text, table, bound, maps, pictures]
    answer([page.load, chosen.input, timer.tick], refresh, [chosen, seen], outputs)
