"""Weights saved before cells became sequences of units load and give the same numbers.

The fixtures were written by that version: a checkpoint of the training command after three steps,
with averaged weights, and the folder that ``save_pretrained`` wrote from it. The model has every
kind of cell: BN-ELU down, BN-swish down, depthwise up and WN-ELU up.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvae_lightning.backends import Compute
from nvae_lightning.inference.loading import load_model
from nvae_lightning.model import NVAE, DepthwiseCell, RegularCell
from nvae_lightning.serialization.architecture import ARCHITECTURE, restore

FIXTURES = Path(__file__).parents[2] / "fixtures" / "earlier_names"
RECORDED: dict[str, Any] = json.loads((FIXTURES / "recorded.json").read_text())
LOAD: dict[str, Callable[[], NVAE]] = {
    "checkpoint": lambda: load_model(FIXTURES / "checkpoint.ckpt"),
    "folder": lambda: load_model(FIXTURES / "pretrained"),
    "folder, plain layers": lambda: NVAE.from_pretrained(FIXTURES / "pretrained"),
}


def _waves(*shape: int) -> Tensor:
    return torch.sin(0.7 * torch.arange(torch.Size(shape).numel()).double()).view(shape)


def _inputs(model: NVAE) -> tuple[Tensor, list[Tensor]]:
    """Binary images and noise that do not depend on a random number generator."""
    size = model.image.size
    x = (_waves(4, 1, size, size) > 0).double()
    return x, [1.3 * _waves(4, *shape) for shape in model.latent_shapes]


@pytest.mark.parametrize("load", LOAD.values(), ids=LOAD.keys())
def test_earlier_weights_reproduce_the_recorded_numbers(load: Callable[[], NVAE]) -> None:
    model = load().double()
    x, noise = _inputs(model)
    with torch.no_grad():
        inference = model(x, noise)
        found = {
            "log_weight": inference.log_weight(x).tolist(),
            "rate": torch.stack([latent.kl for latent in inference.latents]).tolist(),
            "sample_mean": model.sample(4, 0.7, noise).mean.mean((1, 2, 3)).tolist(),
        }
    for name, values in found.items():
        torch.testing.assert_close(values, RECORDED[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("is_plain", [False, True])
def test_a_training_resumes_exactly_from_an_earlier_checkpoint(is_plain: bool) -> None:
    content = torch.load(FIXTURES / "checkpoint.ckpt", weights_only=True)
    model = NVAE(**restore(content[ARCHITECTURE], {})).double().train()
    if not is_plain:
        Compute(recompute="activation").apply(model)
    latest = content["current_model_state"].items()
    weights = {name.removeprefix("model."): v for name, v in latest if name.startswith("model.")}
    model.load_state_dict(weights)
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-2)
    optimizer.load_state_dict(content["optimizer_states"][0])  # in the parameters' order
    x, noise = _inputs(model)
    losses = []
    for _ in RECORDED["losses_after_resuming"]:
        inference = model(x, noise)
        rate = torch.stack([latent.kl for latent in inference.latents]).sum(0)
        loss = (rate - inference.likelihood.log_prob(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(RECORDED["losses_after_resuming"], rel=1e-9)


def test_an_earlier_description_names_normalisation_and_activation_together() -> None:
    config = json.loads((FIXTURES / "pretrained" / "config.json").read_text())["model"]
    assert config["preprocess_cell"]["normalization"] == {"constructor": "BatchNormELU"}
    assert config["postprocess_cell"]["normalization"] == {"constructor": "ELUOnly"}
    architecture = NVAE.from_pretrained(FIXTURES / "pretrained").architecture
    assert architecture["preprocess_cell"]["normalization"] == {"constructor": "BatchNorm"}
    assert architecture["preprocess_cell"]["activation"] == {"constructor": "ELU"}
    assert architecture["postprocess_cell"]["normalization"] == {"constructor": "Identity"}
    assert architecture["postprocess_cell"]["activation"] == {"constructor": "ELU"}


@pytest.mark.parametrize("build", [RegularCell, DepthwiseCell])
def test_current_names_are_kept_and_unknown_ones_reported(
    build: Callable[..., torch.nn.Module],
) -> None:
    cell, other = build(4, 4), build(4, 4)
    cell.load_state_dict(other.state_dict())
    torch.testing.assert_close(cell.state_dict(), other.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*body\.9\.weight"):
        cell.load_state_dict({**other.state_dict(), "body.9.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing key.*body\.0\.norm\.weight"):
        cell.load_state_dict({"body.9.weight": torch.zeros(1)})
