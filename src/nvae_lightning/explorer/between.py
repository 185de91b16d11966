"""Tab: images between two images."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from nvae_lightning.explorer.widgets import (
    answer,
    first_shown,
    image_picker,
    picture_box,
    scale_names,
    seed_box,
)
from nvae_lightning.explorer.workspace import Workspace, picture
from nvae_lightning.inference.latents import mix, standardise

_NUM_STEPS = 5


def interpolate(
    workspace: Workspace,
    first: str | None,
    second: str | None,
    weight: float,
    scales: Sequence[int],
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Interpolate some scales of two images; the others are the first image's.

    Args:
        workspace: Model and limits.
        first: Path of one image.
        second: Path of another.
        weight: Weight of the second image, 0 to 1.
        scales: Scales to interpolate, where 0 is the coarsest.
        seed: Seed of the latents.

    Returns:
        The image at `weight`, and a row of images at evenly spaced weights.

    Raises:
        ValueError: If an image is invalid.
    """
    workspace.check_fits("number of images", _NUM_STEPS)
    model = workspace.model
    one, other = (standardise(model, workspace.infer(file, seed)[1]) for file in (first, second))
    weights = torch.linspace(0.0, 1.0, _NUM_STEPS).tolist()
    row = torch.cat([mix(model, one, other, each, scales) for each in weights])
    return mix(model, one, other, weight, scales), row


def build(workspace: Workspace, page: gr.Blocks, tab: gr.Tab) -> None:
    """Build the tab."""
    names = scale_names(workspace)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            first = image_picker(workspace, "First image")
            second = image_picker(workspace, "Second image", 0.5)
        with gr.Column(scale=2, min_width=320):
            weight = gr.Slider(0.0, 1.0, 0.5, step=0.01, label="Weight of the second image")
            scales = gr.CheckboxGroup(
                names, value=[scale for _, scale in names], label="Scales to interpolate",
                info="The others are the first image's. With weight 1 and only the finest scale, "
                "fine structure is the second image's and the rest the first's.",
            )  # fmt: skip
            seed = seed_box()
            result = picture_box("Image at this weight", height=360)
            row = picture_box("Images at weights from 0 to 1")

    def between(
        first: str | None, second: str | None, weight: float, scales: list[int], seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        image, images = interpolate(workspace, first, second, weight, scales, seed)
        return picture(image, 1), picture(images, _NUM_STEPS)

    changes = [first.change, second.change, weight.change, scales.change, seed.change]
    answer(
        [*first_shown(workspace, tab), *changes],
        between, [first, second, weight, scales, seed], [result, row], workspace, name="between",
    )  # fmt: skip
