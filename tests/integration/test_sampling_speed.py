"""Time saved by sharing the bottom-up pass, measured in alternation."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvae_lightning.model import (
    NVAE,
    BernoulliLikelihood,
    DepthwiseCell,
    DiscretizedLogisticMixtureLikelihood,
    Hierarchy,
    Image,
    RegularCell,
    importance_weighted_bound,
)
from nvae_lightning.utilities.live_bytes import peak_bytes

NUM_SAMPLES, BATCH, ROUNDS = 100, 8, 3


def _model(image: Image, groups: list[int], channels: int, downsample: int) -> NVAE:
    grey = image.bits == 1
    model = NVAE(
        image,
        Hierarchy.doubling(
            channels=channels, num_groups=groups, downsample=downsample, latent_channels=8
        ),
        encoder_cell=RegularCell,
        preprocess_cell=RegularCell,
        decoder_cell=DepthwiseCell,
        postprocess_cell=partial(DepthwiseCell, expansion=3),
        likelihood=BernoulliLikelihood if grey else DiscretizedLogisticMixtureLikelihood,
    )
    return model.eval().to(memory_format=torch.channels_last)


MODELS: dict[str, Callable[[], NVAE]] = {
    "mnist": lambda: _model(Image(channels=1, size=28, bits=1, padding=2), [2, 4], 8, 4),
    "cifar10": lambda: _model(Image(channels=3, size=32, bits=8), [6], 8, 2),
}


def _seconds(function: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    assert function().isfinite().all()
    return time.perf_counter() - started


@torch.no_grad()
def _measure(name: str) -> dict[str, float]:
    torch.manual_seed(0)
    model = MODELS[name]()
    image = model.image
    top = 2**image.bits - 1
    x = torch.randint(0, top + 1, (BATCH, image.channels, image.size, image.size)) / top
    x = x.to(memory_format=torch.channels_last)

    def shared() -> Tensor:
        return model.log_likelihood(x, NUM_SAMPLES)

    def not_shared() -> Tensor:
        weights = [model(x).log_weight(x) for _ in range(NUM_SAMPLES)]
        return importance_weighted_bound(torch.stack(weights))

    model.log_likelihood(x, 5)
    pairs = [(_seconds(shared), _seconds(not_shared)) for _ in range(ROUNDS)]
    return {
        "seconds_shared": statistics.median(a for a, _ in pairs),
        "seconds_not_shared": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "peak_bytes": peak_bytes(lambda: model.log_likelihood(x, NUM_SAMPLES)),
        "memory_budget": 1 << 27,  # the default
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_sharing_the_bottom_up_pass_is_faster_and_stays_within_the_budget(name: str) -> None:
    found = _measure(name)
    if folder := os.environ.get("RESULTS"):
        record = {
            **found,
            "device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "num_importance_samples": NUM_SAMPLES,
            "num_images": BATCH,
        }
        file = Path(folder) / f"importance-samples-{name}-cpu.json"
        file.write_text(json.dumps(record, indent=2) + "\n")
    assert found["ratio"] >= 1.5, found
    assert found["peak_bytes"] <= 1.05 * found["memory_budget"], found
