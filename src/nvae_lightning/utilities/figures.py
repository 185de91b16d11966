"""Figures of images and measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torchvision.utils import make_grid

from nvae_lightning.utilities.files import whole_file

_MOST_COLUMNS = 1000  # of a heat map: about its width in pixels
_LEAST_RATE = 1e-2  # nats: lower rates share one colour


def write(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, with any backend of Matplotlib.

    Raises:
        OSError: If the file is not writable.
    """
    with whole_file(path) as partial:
        FigureCanvasAgg(figure).print_png(partial)


def _draw_grid(axes: Axes, images: Tensor, num_columns: int) -> None:
    images = images.float().cpu().clamp(0.0, 1.0)
    grid = make_grid(images, nrow=num_columns, padding=1, pad_value=1.0)
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")


def dataset_overview(images: Mapping[str, Tensor], title: str, *, num_levels: int) -> Figure:
    """Draw images of each split side by side, above histograms of their values.

    Args:
        images: Images in [0, 1] per split, (count, channel, height, width).
        title: Title of the figure.
        num_levels: Number of values.
    """
    figure = Figure(figsize=(6 * len(images), 9), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, len(images), squeeze=False, height_ratios=[2, 1])
    for (split, batch), picture, histogram in zip(images.items(), axes[0], axes[1], strict=True):
        _draw_grid(picture, batch[:64], num_columns=8)
        picture.set_title(split)
        picture.set_axis_off()
        colours = ("black",) if batch.shape[1] == 1 else ("tab:red", "tab:green", "tab:blue")
        for channel, colour in enumerate(colours):
            values = (batch[:, channel] * (num_levels - 1)).round().long().flatten().cpu()
            share = torch.bincount(values, minlength=num_levels) / len(values)
            edges = torch.arange(num_levels + 1) - 0.5
            histogram.stairs(share.numpy(), edges.numpy(), color=colour, linewidth=1.2)
        histogram.set_xlabel(f"value ({num_levels} levels)")
        histogram.set_ylabel("share of pixels")
        histogram.set_xlim(-0.5, num_levels - 0.5)
        histogram.xaxis.set_major_locator(MaxNLocator(integer=True))
        histogram.set_ylim(bottom=0)
    return figure


def rate_per_group(
    rates: Sequence[float], active: Sequence[float], scale_of_group: Sequence[int]
) -> Figure:
    """Draw the rate of every group as a bar, coloured by scale, with its active channels.

    Args:
        rates: Rates in nats per image, coarsest group first.
        active: Number of active channels of each group.
        scale_of_group: Index of each group's scale.
    """
    figure = Figure(figsize=(max(6.0, 2.0 + 0.35 * len(rates)), 4.5), layout="constrained")
    axes = figure.subplots()
    num_scales = max(scale_of_group) + 1
    colours = mpl.colormaps["viridis"].resampled(num_scales + 1)
    groups = range(len(rates))
    for scale in range(num_scales):
        own = [group for group in groups if scale_of_group[group] == scale]
        axes.bar(own, [rates[g] for g in own], color=colours(scale), label=f"scale {scale}")
    bottom, top = min(0.0, *rates), max(*rates, 0.1)
    for group in groups:
        at = max(rates[group], 0.0) + 0.01 * (top - bottom)
        axes.text(group, at, f"{active[group]:.0f}", ha="center", va="bottom", fontsize=8)
    axes.set_ylim(bottom, 1.08 * top)
    axes.set(xlabel="group, coarsest (0) to finest", ylabel="rate (nats per image)")
    axes.set_title("rate per group; the numbers are active channels", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(title="coarsest first", fontsize=8, title_fontsize=8)
    return figure


def lines_per_group(steps: Sequence[int], rates: Sequence[Sequence[float]]) -> Figure:
    """Draw the rate of every group over the training, as in the paper's Fig. 5b.

    Args:
        steps: Training steps in ascending order.
        rates: Rates at each step in nats per image, coarsest group first.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    # The lightest yellow is hardly visible as a line on white.
    scale = Normalize(0, len(rates[0]))
    colours = mpl.colormaps["viridis"]
    marker = "o" if len(steps) == 1 else ""
    for group, values in enumerate(zip(*rates, strict=True)):
        axes.plot(steps, values, color=colours(scale(group)), linewidth=1.2, marker=marker)
    axes.set(xlabel="training step", ylabel="KL per group (nats)")
    # KL starts hundreds of times higher than it ends, and estimates with flows may be negative.
    axes.set_yscale("symlog", linthresh=1.0)
    axes.grid(alpha=0.3)
    ticks = MaxNLocator(integer=True)
    label = "group, coarsest (0) to finest"
    figure.colorbar(ScalarMappable(scale, colours), ax=axes, ticks=ticks, label=label)
    return figure


def heat_maps_per_group(
    steps: Sequence[int],
    rates: Sequence[Sequence[float]],
    balance: Sequence[Sequence[float]],
    active: Sequence[Sequence[float]],
    *,
    scale_of_group: Sequence[int],
    latent_channels: int,
) -> Figure:
    """Draw rate, balancing factor and active channels of every group over the training.

    A column extends from the previous step to its own; very many are thinned out. White lines
    separate the scales; NaN is grey.

    Args:
        steps: Training steps in ascending order.
        rates: Rates at each step in nats per image, coarsest group first.
        balance: Balancing factors.
        active: Numbers of active channels.
        scale_of_group: Index of each group's scale.
        latent_channels: Number of channels of a group.
    """
    stride = -(-len(steps) // _MOST_COLUMNS)
    chosen = range(len(steps))[::-stride][::-1]  # including the last
    ends = [steps[index] for index in chosen]
    edges = [max(0, 2 * ends[0] - ends[1]) if len(ends) > 1 else ends[0] - 1, *ends]
    maps = [torch.tensor([rows[index] for index in chosen]) for rows in (rates, balance, active)]
    norms = [
        LogNorm(_LEAST_RATE, _largest(maps[0], 10 * _LEAST_RATE)),
        Normalize(0.0, _largest(maps[1], 1.0)),
        Normalize(0, latent_channels),
    ]
    # Estimates with flows may be negative for a collapsed group, which has no logarithm.
    maps[0] = maps[0].clamp_min(_LEAST_RATE)
    labels = ("KL (nats per image)", "balancing factor", f"active channels, of {latent_channels}")
    num_groups = len(scale_of_group)
    height = max(1.6, 0.6 + 0.11 * num_groups)
    figure = Figure(figsize=(9, 0.6 + 3 * height), layout="constrained")
    colours = mpl.colormaps["viridis"].with_extremes(bad="lightgrey")
    rows = [group - 0.5 for group in range(num_groups + 1)]
    all_axes = figure.subplots(3, sharex=True)
    for axes, values, norm, label in zip(all_axes, maps, norms, labels, strict=True):
        mesh = axes.pcolormesh(edges, rows, values.T.numpy(), norm=norm, cmap=colours)
        for group in range(1, num_groups):
            if scale_of_group[group] != scale_of_group[group - 1]:
                axes.axhline(group - 0.5, color="white", linewidth=1.0)
        axes.set_ylim(num_groups - 0.5, -0.5)  # the coarsest on top
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("group (0: coarsest)")
        figure.colorbar(mesh, ax=axes, label=label, extend="min" if norm is norms[0] else None)
    all_axes[-1].set_xlabel("training step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _largest(values: Tensor, least: float) -> float:
    """Return the largest finite value, at least `least`."""
    return float(torch.cat([values[values.isfinite()], torch.tensor([least])]).max())


def most_and_least_likely(
    images: Callable[[Tensor], Tensor],
    log_likelihood: Tensor,
    *,
    binarized: bool = False,
) -> Figure:
    """Draw the most and the least likely images in descending order.

    Args:
        images: Function of indices that returns images (count, channel, height, width) in [0, 1].
        log_likelihood: Log-likelihood of each image in nats.
        binarized: Whether the model saw the images binarised, which the titles then mention.
    """
    order = log_likelihood.argsort(descending=True)
    num_each = min(20, max(1, len(order) // 2))
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    titles = ("most likely", "least likely")
    for axes, title, chosen in zip(
        figure.subplots(2), titles, (order[:num_each], order[-num_each:]), strict=True
    ):
        _draw_grid(axes, images(chosen), num_columns=10)
        first, last = (float(log_likelihood[chosen[index]]) for index in (0, -1))
        note = " (images binarised for the model)" if binarized else ""
        axes.set_title(f"{title}{note}: {first:,.1f} to {last:,.1f} nats", fontsize=10)
        axes.set_axis_off()
    return figure


def histograms(
    scores: Mapping[str, tuple[Tensor, Tensor]], areas: Sequence[float], labels: tuple[str, str]
) -> Figure:
    """Draw the histograms of each score for two sets of images.

    Args:
        scores: Scores of both sets, by name.
        areas: Area under the ROC curve of each score.
        labels: Labels of the sets.
    """
    num_columns = min(3, len(scores))
    num_rows = -(-len(scores) // num_columns)
    figure = Figure(figsize=(4 * num_columns, 3 * num_rows), layout="constrained")
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in all_axes[len(scores) :]:
        axes.set_axis_off()
    for axes, (name, pair), area in zip(all_axes, scores.items(), areas, strict=False):
        low, high = (float(torch.cat(pair).quantile(q)) for q in (0.005, 0.995))
        for values, label in zip(pair, labels, strict=True):
            clipped = values.clamp(low, high).numpy()
            axes.hist(clipped, bins=40, range=(low, high), density=True, alpha=0.6, label=label)
        axes.set_title(f"{name}: AUROC {area:.3f}", fontsize=10)
        axes.set_xlabel("nats", fontsize=8)
        axes.set_yticks([])
    figure.axes[0].legend(fontsize=8)
    return figure


def rows_of_images(rows: Tensor, labels: Sequence[str]) -> Figure:
    """Draw rows of images, each with a label to its left.

    Args:
        rows: Images (row, column, channel, height, width) in [0, 1].
        labels: Label of each row.
    """
    num_rows, num_columns = rows.shape[:2]
    figure = Figure(figsize=(1.0 * num_columns + 0.8, 1.0 * num_rows), layout="constrained")
    all_axes = figure.subplots(num_rows, squeeze=False).flatten()
    for axes, row, label in zip(all_axes, rows, labels, strict=True):
        _draw_grid(axes, row, num_columns)
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.set_dpi(150)
    return figure


@dataclass(frozen=True)
class Comparison:
    """One column of a table, measured and published; NaN stands for missing values.

    Args:
        title: Title of the column.
        labels: Labels of the rows.
        measured: Measured means.
        errors: Standard errors of the means.
        published: Published values.
    """

    title: str
    labels: Sequence[str]
    measured: Sequence[float]
    errors: Sequence[float]
    published: Sequence[float]


def measured_beside_published(comparisons: Sequence[Comparison]) -> Figure:
    """Draw a pair of panels per column: the measured values beside the published ones.

    Their axes differ, because training budgets do; only the order of the rows is comparable.
    """
    num_columns = min(2, len(comparisons))
    num_rows = -(-len(comparisons) // num_columns)
    figure = Figure(figsize=(6.4 * num_columns, 3.6 * num_rows), layout="constrained")
    places = figure.subfigures(num_rows, num_columns, squeeze=False).flatten()
    for place, panel in zip(places, comparisons, strict=False):
        place.suptitle(panel.title, fontsize=10)
        sides = [("measured here", panel.measured, panel.errors, "o", "tab:blue")]
        if any(value == value for value in panel.published):
            none = [0.0] * len(panel.published)
            sides.append(("in the paper", panel.published, none, "D", "tab:orange"))
        all_axes = place.subplots(1, len(sides), squeeze=False).flatten()
        for axes, (title, values, errors, marker, colour) in zip(all_axes, sides, strict=True):
            bars = [0.0 if error != error else error for error in errors]
            rows = range(len(panel.labels))
            axes.errorbar(rows, values, bars, fmt=marker, color=colour, capsize=3)
            axes.set_title(title, color=colour, fontsize=9)
            axes.set_xticks(rows, panel.labels, fontsize=8, rotation=25, ha="right")
            axes.set_xlim(-0.5, len(panel.labels) - 0.5)
            axes.tick_params("y", labelsize=8)
            axes.grid(axis="y", alpha=0.3)
    return figure


def phases_beside_roofline(
    labels: Sequence[str], phases: Sequence[Mapping[str, float]], rooflines: Sequence[float]
) -> Figure:
    """Draw the phases of a step as one bar per setting, with its time at the roofline.

    Args:
        labels: Names of the settings.
        phases: Milliseconds per image of each phase, for each setting.
        rooflines: Milliseconds per image at the roofline, for each setting.
    """
    figure = Figure(figsize=(8, 1.6 + 0.6 * len(labels)), layout="constrained")
    axes = figure.subplots()
    colours = mpl.colormaps["viridis"].resampled(len(phases[0]) + 1)
    ends = [0.0] * len(labels)
    for index, phase in enumerate(phases[0]):
        widths = [own[phase] for own in phases]
        axes.barh(range(len(labels)), widths, 0.6, ends, color=colours(index), label=phase)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for index, least in enumerate(rooflines):
        label = "roofline" if index == 0 else None
        axes.plot([least] * 2, [index - 0.4, index + 0.4], color="tab:red", lw=2, label=label)
    wrapped = ["\n".join(wrap(label, 40)) for label in labels]
    axes.set_yticks(range(len(labels)), wrapped, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per image")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(phases[0]) + 1, fontsize=8)
    return figure


@dataclass(frozen=True)
class Line:
    """A straight line fitted to measurements.

    Args:
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        x: Positions in ascending order.
        y: Measured values.
        slope: Slope of the line.
        intercept: Value of the line at zero.
        bend: First position whose value deviates from the line through those before it, or None.
    """

    x_label: str
    y_label: str
    x: Sequence[float]
    y: Sequence[float]
    slope: float
    intercept: float
    bend: float | None

    def at(self, x: float) -> float:
        """Return the value of the line."""
        return self.intercept + self.slope * x


def fitted_lines(lines: Sequence[Line]) -> Figure:
    """Draw a panel per line, in a row for each name of the vertical axis."""
    num_rows = len({line.y_label for line in lines})
    num_columns = len(lines) // num_rows
    figure = Figure(figsize=(3.2 * num_columns, 2.8 * num_rows), layout="constrained")
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes, line in zip(all_axes, lines, strict=True):
        ends = (0.0, line.x[-1])
        axes.plot(ends, [*map(line.at, ends)], label="fitted line")
        axes.plot(line.x, line.y, "o", color="tab:orange", label="measured")
        if line.bend is not None:
            axes.axvline(line.bend, color="grey", linestyle=":", label="stops being linear")
        axes.set(xlabel=line.x_label, ylabel=line.y_label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    drawn = {artist.get_label(): artist for axes in all_axes for artist in axes.lines}
    figure.legend(handles=list(drawn.values()), loc="outside upper center", ncols=len(drawn))
    return figure
