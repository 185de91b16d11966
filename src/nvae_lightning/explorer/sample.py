"""Tab: images drawn from the prior."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import gradio as gr
import numpy as np
from torch import Tensor

from nvae_lightning.explorer.widgets import answer, picture_box, scale_names, seed_box
from nvae_lightning.explorer.workspace import Workspace, generator, picture
from nvae_lightning.inference.latents import draw_noise
from nvae_lightning.utilities.images import as_pixels

_MOST_SHOWN = 64


def draw(
    workspace: Workspace,
    temperature: list[float],
    count: int,
    seed: int,
    recalibrate: bool = False,
    progress: Callable[[range], Iterable[int]] | None = None,
) -> Tensor:
    """Draw images: means of p(x | z).

    Args:
        workspace: Model and limits.
        temperature: Temperature of every scale, coarsest first.
        count: Number of images.
        seed: Seed of the noise.
        recalibrate: Whether to recalibrate batch normalisation for the temperature.
        progress: Function that shows the progress of a loop.

    Raises:
        ValueError: If they do not fit into the memory budget, or the temperature is invalid.
    """
    workspace.check_fits("number of images", count)
    model = workspace.model
    noise = draw_noise(model, count, generator(seed))
    if recalibrate:
        model = workspace.sampler(temperature, progress)
    return model.sample(count, temperature, noise).mean


@cache
def downloads() -> tempfile.TemporaryDirectory[str]:
    """Return the folder of downloads, which is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="nvae-explore-")


def write_npz(images: Tensor) -> str:
    """Write images as `sample` does, with 8 bits."""
    file = Path(tempfile.mkdtemp(dir=downloads().name)) / "samples.npz"
    np.savez_compressed(file, images=as_pixels(images).numpy())
    return str(file)


def build(workspace: Workspace, page: gr.Blocks, tab: gr.Tab) -> None:
    """Build the tab."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            scales = [
                gr.Slider(0.0, 1.5, 1.0, step=0.05, label=f"Temperature at {name}")
                for name, _ in scale_names(workspace)
            ]
            most = min(_MOST_SHOWN, workspace.most_images)
            count = gr.Slider(1, most, min(16, most), step=1, label="Number of images")
            seed = seed_box()
            recalibrate = gr.Checkbox(
                label="Recalibrate batch normalisation",
                info="Better samples at low temperatures; takes a while once per temperature.",
            )
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=2, min_width=320):
            result = picture_box("Samples")
            file = gr.DownloadButton("Download as .npz", size="sm")

    def sample(
        count: int,
        seed: int,
        recalibrate: bool,
        *temperature: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 -- as gradio finds it
    ) -> tuple[np.ndarray, str]:
        def show(steps: range) -> Iterable[int]:
            return progress.tqdm(steps, desc="Recalibrating")

        images = draw(workspace, [*temperature], count, seed, recalibrate, show)
        return picture(images, math.ceil(math.sqrt(count))), write_npz(images)

    answer(
        [button.click, page.load, seed.change, count.release, *(s.release for s in scales)],
        sample, [count, seed, recalibrate, *scales], [result, file], workspace, name="sample",
    )  # fmt: skip
