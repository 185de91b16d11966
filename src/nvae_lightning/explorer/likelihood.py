"""Tab: how likely an image is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import gradio as gr
import numpy as np
import torch

from nvae_lightning.explorer import plots
from nvae_lightning.explorer.widgets import answer, first_shown, image_picker, plot_box, seed_box
from nvae_lightning.explorer.workspace import Workspace, generator
from nvae_lightning.inference.anomaly import AnomalyScores
from nvae_lightning.inference.batches import fork_torch
from nvae_lightning.objective import bits_per_dim

_NOTHING_TO_COMPARE = (
    "No test images to compare with: start the page with dataset=NAME and dataset.root=FOLDER."
)


@dataclass(frozen=True)
class Scores:
    """Scores of one image, as `score` writes them.

    Args:
        log_likelihood: Importance-weighted bound in nats.
        bpd: The same in bits per dim.
        ratios: LLR>k in nats by k.
    """

    log_likelihood: float
    bpd: float
    ratios: dict[int, float]


def score(workspace: Workspace, file: str | None, seed: int) -> Scores:
    """Score an image with ten importance samples.

    Raises:
        ValueError: If the image is invalid or does not fit into the memory budget.
    """
    module = AnomalyScores(workspace.model, memory_budget=workspace.memory_budget)
    x = workspace.read(file, generator(seed))
    with fork_torch(workspace.device):
        torch.manual_seed(seed)
        value, *ratios = module.predict_step(x, 0)[0].tolist()
    bpd = float(bits_per_dim(-value, workspace.model.image.num_dims))
    return Scores(value, bpd, dict(zip(module.ks, ratios, strict=True)))


def describe(scores: Scores) -> str:
    """Describe scores in Markdown."""
    return f"**log p(x) ≥ {scores.log_likelihood:,.2f} nats**, {scores.bpd:.4f} bits per dim"


def place(workspace: Workspace, file: str | None, seed: int) -> tuple[str, np.ndarray] | None:
    """Describe and draw the place of an image among test images; None without a dataset.

    Raises:
        ValueError: If the image is invalid.
    """
    if (reference := workspace.reference) is None:
        return None
    value = float(workspace.log_likelihood(workspace.read(file, generator(seed)), seed))
    share = float((reference < value).float().mean())
    text = f"More likely than {share:.0%} of {len(reference):,} test images."
    return text, plots.place_in_histogram(reference, value, "log p(x) (nats)")


def build(workspace: Workspace, page: gr.Blocks, tab: gr.Tab) -> None:
    """Build the tab."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = image_picker(workspace, "Image")
            seed = seed_box()
            button = gr.Button("Score", variant="primary")
        with gr.Column(scale=2, min_width=320):
            has_tests = workspace.test_set is not None
            text = gr.Markdown()
            among = gr.Markdown("" if has_tests else _NOTHING_TO_COMPARE)
            with gr.Row():
                histogram = plot_box("Among the test images", visible=has_tests, min_width=280)
                bars = plot_box("Likelihood ratios", min_width=280)
            gr.Markdown(
                "LLR>k is how much the k finest groups add to the bound. Foreign images have high "
                "ratios, because the coarse groups do not fit them (Havtorn et al. 2021)."
            )

    def likelihood(file: str | None, seed: int) -> tuple[str, np.ndarray]:
        scores = score(workspace, file, seed)
        return describe(scores), plots.ratios([*scores.ratios], [*scores.ratios.values()])

    events, inputs = [*first_shown(workspace, tab), button.click, image.change], [image, seed]
    answer(events, likelihood, inputs, [text, bars], workspace, name="likelihood")
    if has_tests:  # the first time takes a few seconds
        show = partial(place, workspace)
        answer(events, show, inputs, [among, histogram], workspace, name="place")
