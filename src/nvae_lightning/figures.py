"""Figures of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torchvision.utils import make_grid


def write(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    FigureCanvasAgg(figure).print_png(path)


def rate_per_group(
    rates: Sequence[float], active: Sequence[float], scale_of_group: Sequence[int]
) -> Figure:
    """Draw the rate of every group as a bar, coloured by its scale, with its active channels.

    Args:
        rates: nats per image, coarsest group first.
        active: number of active channels.
        scale_of_group: index of the group's scale.
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


def most_and_least_likely(
    images: Callable[[Tensor], Tensor], log_likelihood: Tensor, *, num_each: int = 20
) -> Figure:
    """Draw the most and the least likely images, from the most to the least.

    Args:
        images: given indices, returns images (count, channel, height, width) in [0, 1].
        log_likelihood: nats of each.
        num_each: how many of both, at most half of all.
    """
    order = log_likelihood.argsort(descending=True)
    num_each = min(num_each, max(1, len(order) // 2))
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    titles = ("most likely", "least likely")
    for axes, title, chosen in zip(
        figure.subplots(2), titles, (order[:num_each], order[-num_each:]), strict=True
    ):
        grid = make_grid(images(chosen).float().cpu(), nrow=10, padding=1, pad_value=1.0)
        axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        first, last = (float(log_likelihood[chosen[index]]) for index in (0, -1))
        axes.set_title(f"{title}: {first:,.1f} to {last:,.1f} nats", fontsize=10)
        axes.set_axis_off()
    return figure


def histograms(
    scores: Mapping[str, tuple[Tensor, Tensor]], areas: Sequence[float], labels: tuple[str, str]
) -> Figure:
    """Draw how often two sets of images have each score.

    Args:
        scores: of both sets, by name.
        areas: under the ROC curve, of each score.
        labels: of the sets.
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
