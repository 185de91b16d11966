"""Tab: what each group of latents holds."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from nvae_lightning.explorer import plots
from nvae_lightning.explorer.widgets import (
    answer,
    first_shown,
    group_names,
    image_picker,
    picture_box,
    plot_box,
    seed_box,
)
from nvae_lightning.explorer.workspace import Workspace, generator, picture
from nvae_lightning.inference.latents import draw_noise, redraw, standardise

#: Number of redrawn images.
NUM_DRAWS = 8


def explain(
    workspace: Workspace, file: str | None, frozen: Sequence[int], temperature: float, seed: int
) -> tuple[Tensor, Tensor, list[float]]:
    """Infer an image, keep some of its groups and redraw the others.

    Args:
        workspace: Model and limits.
        file: Path of the image.
        frozen: Groups to keep, where 0 is the coarsest.
        temperature: Factor on the noise of the others.
        seed: Seed of all random numbers.

    Returns:
        The image and its reconstruction, the redrawn images, and the KL of every group in nats.

    Raises:
        ValueError: If the image or a setting is invalid.
    """
    workspace.check_fits("number of images", NUM_DRAWS)
    x, inference = workspace.infer(file, seed)
    noise = draw_noise(workspace.model, NUM_DRAWS, generator(seed + 1))
    latents = standardise(workspace.model, inference)
    images = redraw(workspace.model, latents, noise, frozen, temperature)
    pair = torch.cat([x, inference.likelihood.mean])
    return pair, images, [float(latent.kl) for latent in inference.latents]


def build(workspace: Workspace, page: gr.Blocks, tab: gr.Tab) -> None:
    """Build the tab."""
    names = group_names(workspace)
    half = workspace.num_groups // 2
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = image_picker(workspace, "Image")
            keep = gr.Slider(
                0, workspace.num_groups, half, step=1, label="Groups to keep, from the coarsest"
            )
            frozen = gr.CheckboxGroup(names, value=[*range(half)], label="Kept groups, one by one")
            temperature = gr.Slider(0.0, 1.5, 1.0, step=0.05, label="Temperature of the others")
            seed = seed_box()
        with gr.Column(scale=2, min_width=320):
            redrawn = picture_box("Other groups redrawn")
            with gr.Row():
                pair = picture_box("Image and reconstruction", min_width=280)
                bars = plot_box("KL of every group", min_width=280)

    def groups(
        file: str | None, frozen: list[int], temperature: float, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        both, images, rates = explain(workspace, file, frozen, temperature, seed)
        scales = [scale for scale, _ in workspace.model.hierarchy.groups]
        return picture(images, 4), picture(both, 2), plots.rates(rates, scales)

    answer([keep.change], lambda count: [*range(count)], [keep], [frozen])
    changes = [image.change, frozen.change, temperature.change, seed.change]
    answer(
        [*first_shown(workspace, tab), *changes],
        groups, [image, frozen, temperature, seed], [redrawn, pair, bars], workspace,
        name="groups",
    )  # fmt: skip
