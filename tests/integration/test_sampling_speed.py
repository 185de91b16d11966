"""Work saved by sharing the bottom-up pass, counted; timed as well if RESULTS names a folder."""

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
from torch.utils.flop_counter import FlopCounterMode

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


def _flops(function: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def _record(name: str, shared: Callable[[], Tensor], not_shared: Callable[[], Tensor]) -> None:
    """Write the times of both to a file in the folder RESULTS, if set."""
    if "RESULTS" not in os.environ:
        return
    pairs = [(_seconds(shared), _seconds(not_shared)) for _ in range(ROUNDS)]
    record = {
        "seconds_shared": statistics.median(a for a, _ in pairs),
        "seconds_not_shared": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "num_importance_samples": NUM_SAMPLES,
        "num_images": BATCH,
    }
    file = Path(os.environ["RESULTS"]) / f"importance-samples-{name}-cpu.json"
    file.write_text(json.dumps(record, indent=2) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_sharing_the_bottom_up_pass_saves_work_and_stays_within_the_budget(name: str) -> None:
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

    _record(name, shared, not_shared)
    assert _flops(not_shared) >= 1.5 * _flops(shared)
    assert peak_bytes(shared) <= 1.05 * (1 << 28)  # the default budget
