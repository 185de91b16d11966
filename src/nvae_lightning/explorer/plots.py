"""Plots that are readable on a phone: few, large labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

_LEAST_RATE = 1e-2  # nats: lower rates share one colour

Curve = tuple[Sequence[float], Sequence[float]]


def _new(num_panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels below one another, and room on top for the label of its box."""
    figure = Figure(figsize=(4.6, 0.3 + 2.6 * num_panels), dpi=200, layout="constrained")
    axes = [*figure.subplots(num_panels, squeeze=False).flatten()]
    for each in axes:
        each.tick_params(labelsize=8)
        each.spines[["top", "right"]].set_visible(False)
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0.0, 0.0, 1.0, 1.0 - 0.3 / figure.get_figheight()))
    return figure, axes


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def rates(values: Sequence[float], scale_of_group: Sequence[int]) -> np.ndarray:
    """Draw the KL of every group as a bar, coloured by scale."""
    figure, (axes,) = _new()
    colours = mpl.colormaps["viridis"].resampled(max(scale_of_group) + 2)
    axes.bar(range(len(values)), values, color=[colours(scale) for scale in scale_of_group])
    axes.set_xlabel("group, coarsest (0) to finest", fontsize=9)
    axes.set_ylabel("KL (nats)", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _pixels(figure)


def ratios(ks: Sequence[int], values: Sequence[float]) -> np.ndarray:
    """Draw the likelihood ratios LLR>k as bars."""
    figure, (axes,) = _new()
    axes.bar([str(k) for k in ks], values, color="tab:orange")
    axes.set_xlabel("k: finest groups drawn from their priors", fontsize=9)
    axes.set_ylabel("LLR>k (nats)", fontsize=9)
    return _pixels(figure)


def place_in_histogram(reference: Tensor, value: float, label: str) -> np.ndarray:
    """Draw a histogram of the test images, and the place of one image in it."""
    figure, (axes,) = _new()
    axes.hist(reference.cpu().numpy(), bins=30, color="tab:blue", alpha=0.7)
    axes.axvline(value, color="tab:red", linewidth=2)
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("test images", fontsize=9)
    return _pixels(figure)


def curves(runs: Mapping[str, Mapping[str, Curve]], label: str) -> np.ndarray:
    """Draw curves of several runs over the training step.

    Args:
        runs: Steps and values of every curve, by run; the first is drawn solid, others dashed.
        label: Label of the values.
    """
    figure, (axes,) = _new()
    values = []
    for index, (name, own) in enumerate(runs.items()):
        for style, (stage, (steps, found)) in zip(("-", "--"), own.items(), strict=False):
            axes.plot(
                steps, found, style, color=f"C{index}", linewidth=1.2, label=f"{name} {stage}",
                marker="." if len(steps) < 2 else "",
            )  # fmt: skip
            values += found
    if finite := [value for value in values if np.isfinite(value)]:
        # The bound starts hundreds of nats below its end.
        low, high = np.quantile(finite, 0.1), max(finite)
        margin = 0.05 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
        axes.legend(fontsize=7, loc="lower right")
    axes.set_xlabel("training step", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.grid(alpha=0.3)
    return _pixels(figure)


def heat_maps(runs: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]]) -> np.ndarray:
    """Draw the KL of every group over the training step as colours, coarsest group on top.

    Args:
        runs: Steps, and rates of all groups at each, by run.
    """
    figure, all_axes = _new(len(runs))
    for axes, (name, (steps, rows)) in zip(all_axes, runs.items(), strict=True):
        values = np.clip(np.array(rows).T, _LEAST_RATE, None)
        high = max(float(np.nanmax(values)), 10 * _LEAST_RATE)
        edges = [2 * steps[0] - steps[1] if len(steps) > 1 else steps[0] - 1, *steps]
        groups = np.arange(len(values) + 1) - 0.5
        mesh = axes.pcolormesh(edges, groups, values, norm=LogNorm(_LEAST_RATE, high))
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("group (0: coarsest)", fontsize=9)
        axes.set_title(name, fontsize=9)
        bar = figure.colorbar(mesh, ax=axes)
        bar.set_label("KL (nats)", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    all_axes[-1].set_xlabel("training step", fontsize=9)
    return _pixels(figure)
