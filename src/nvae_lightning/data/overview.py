"""A picture of a dataset as the model sees it."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torchvision.utils import make_grid


def draw_overview(
    images: Mapping[str, Float[Tensor, "..."]], title: str, *, num_levels: int
) -> Figure:
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
        grid = make_grid(batch[:64].cpu(), nrow=8, padding=1, pad_value=1.0)
        picture.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
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
