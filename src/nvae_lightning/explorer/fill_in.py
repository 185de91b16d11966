"""Tab: painted pixels are filled in."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from nvae_lightning.data.image_formats import open_image
from nvae_lightning.explorer.widgets import answer, image_picker, picture_box, seed_box
from nvae_lightning.explorer.workspace import Workspace, generator, picture
from nvae_lightning.inference.restoration import Restoration, inpaint
from nvae_lightning.utilities.images import as_bytes, enlarge

_NUM_COMPLETIONS = 4
_LEAST_CANVAS = 320  # pixels, below which an image is enlarged to paint on it
_MOST_ROUNDS = 200
_MOST_PENDING = 64


def opacities(canvas: gr.ImageEditor, payload: Any) -> np.ndarray | None:  # noqa: ANN401
    """Return what was painted on an image editor: opacities from 0 to 1, None if nothing.

    It replaces the editor's own ``preprocess``, which would decode images of any size; only layers
    are decoded, with the limits of all uploads. A subclass could not: gradio writes a stub file
    beside the source of each.

    Args:
        canvas: Image editor.
        payload: What the browser sent: files, or the key of what it sent before.

    Raises:
        ValueError: If a layer is too large or not an image, or layers differ in size.
    """
    if payload is None:
        return None
    if payload.id is not None:
        payload = canvas.blob_storage.pop(payload.id, None)
        while len(canvas.blob_storage) > _MOST_PENDING:  # of browsers that went away
            canvas.blob_storage.pop(next(iter(canvas.blob_storage)), None)
    layers = [] if payload is None else [layer for layer in payload.layers if layer is not None]
    found = []
    try:
        for layer in layers:
            content = layer if isinstance(layer, bytes) else Path(layer.path).read_bytes()
            with open_image(content) as image:
                found.append(np.asarray(image.convert("RGBA"))[..., 3] / 255)
        return np.max(found, axis=0) if found else None
    except Exception as error:
        raise ValueError(
            "mask: the painted layers are no images, too large, or differ in size; paint again"
        ) from error


def known_pixels(painted: np.ndarray | None, size: int) -> Tensor:
    """Return whether each pixel of an image is known, from what was painted on its enlargement.

    Args:
        painted: Opacities; a pixel of which a quarter or more is painted is missing.
        size: Height and width of the image.

    Raises:
        ValueError: If no pixel is painted.
    """
    share = torch.zeros(size, size)
    if painted is not None:
        opacity = torch.from_numpy(np.ascontiguousarray(painted)).float()[None, None]
        share = torch.nn.functional.adaptive_avg_pool2d(opacity, size)[0, 0]
    known = share < 0.25
    if bool(known.all()):
        raise ValueError("mask: nothing is painted; paint over the pixels to fill in")
    return known


def enlarged(image: Tensor) -> np.ndarray:
    """Enlarge an image by an integer factor, so that one can paint on it."""
    pixels = enlarge(as_bytes(image[0]), _LEAST_CANVAS)
    return pixels.permute(1, 2, 0).expand(-1, -1, 3).cpu().numpy()


def complete(
    workspace: Workspace,
    file: str | None,
    known: Tensor,
    num_rounds: int,
    temperature: float,
    seed: int,
) -> tuple[Tensor, Restoration]:
    """Fill in the pixels of an image that are not known.

    Returns:
        The image and its completions.

    Raises:
        ValueError: If the image or a setting is invalid.
    """
    workspace.check_fits("number of completions", _NUM_COMPLETIONS)
    if num_rounds > _MOST_ROUNDS:
        raise ValueError(f"rounds: got {num_rounds}, but at most {_MOST_ROUNDS} are supported")
    random = generator(seed)
    x = workspace.read(file, random)
    return x, inpaint(
        workspace.model, x, known.to(x.device), num_completions=_NUM_COMPLETIONS,
        num_rounds=num_rounds, temperature=temperature, generator=random,
    )  # fmt: skip


def build(workspace: Workspace, page: gr.Blocks, tab: gr.Tab) -> None:
    """Build the tab."""
    size = workspace.model.image.size
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            image = image_picker(workspace, "Image")
            canvas = gr.ImageEditor(
                label="Paint over the pixels to fill in", sources=[], transforms=[], layers=False,
                brush=gr.Brush(default_size=40, colors=["#e5484d"], color_mode="fixed"),
                canvas_size=(_LEAST_CANVAS, _LEAST_CANVAS), height=440, format="png", buttons=[],
                elem_id="canvas",
            )  # fmt: skip
            canvas.preprocess = partial(opacities, canvas)  # pyright: ignore
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                rounds = gr.Slider(1, _MOST_ROUNDS, 30, step=1, label="Rounds")
                temperature = gr.Slider(0.0, 1.5, 1.0, step=0.05, label="Temperature")
                seed = seed_box()
            button = gr.Button("Fill in", variant="primary")
            result = picture_box("Known pixels and four completions")
            std = picture_box("Standard deviation of every pixel (white: 0.5)", height=240)

    def background(file: str | None, seed: int) -> dict[str, Any] | None:
        if file is None:
            return None
        x = workspace.read(file, generator(seed))
        return {"background": enlarged(x), "layers": [], "composite": None}

    def fill_in(
        file: str | None, painted: np.ndarray | None, rounds: int, temperature: float, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        known = known_pixels(painted, size)
        x, restored = complete(workspace, file, known, rounds, temperature, seed)
        row = torch.cat([torch.where(known.to(x.device), x, 0.5), restored.images])
        return picture(row, len(row)), picture(2 * restored.std[None], 1)

    answer([page.load, image.change, seed.change], background, [image, seed], [canvas])
    answer(
        [button.click], fill_in, [image, canvas, rounds, temperature, seed], [result, std],
        workspace, name="fill_in",
    )  # fmt: skip
