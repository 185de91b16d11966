"""Recalibration of batch normalisation for samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nvae_lightning.inference.batches import fork_torch
from nvae_lightning.inference.tensor_cache import TensorCache, hash_of
from nvae_lightning.model import NVAE
from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.model.nvae import Temperature
from nvae_lightning.utilities.image import require_int


def _norms(model: NVAE) -> dict[str, BatchNorm]:
    """Return the batch normalisations that affect sampling."""
    named = model.decoder.named_modules()
    return {name: module for name, module in named if isinstance(module, BatchNorm)}


def _statistics(model: NVAE) -> dict[str, Tensor]:
    return {
        f"{name}.{kind}": value
        for name, norm in _norms(model).items()
        for kind, value in norm.named_buffers()
    }


def _set_statistics(model: NVAE, statistics: Mapping[str, Tensor]) -> None:
    for name, value in _statistics(model).items():
        value.copy_(statistics[name])


@contextmanager
def _restored(model: NVAE) -> Iterator[None]:
    """Restore statistics and training modes of batch normalisation at the end."""
    before = {name: value.clone() for name, value in _statistics(model).items()}
    were_training = {norm: norm.training for norm in _norms(model).values()}
    try:
        yield
    finally:
        for norm, was_training in were_training.items():
            norm.train(was_training)
        _set_statistics(model, before)


@contextmanager
def with_statistics(model: NVAE, statistics: Mapping[str, Tensor]) -> Iterator[None]:
    """Use other statistics of batch normalisation within the context."""
    with _restored(model):
        _set_statistics(model, statistics)
        yield


@torch.no_grad()
def recalibrate(
    model: NVAE,
    temperature: Temperature = 1.0,
    *,
    num_passes: int = 500,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] | None = None,
) -> dict[str, Tensor]:
    """Measure the statistics of batch normalisation for samples at a temperature.

    The model is unchanged: see :func:`with_statistics`.

    Source: Vahdat & Kautz 2020, Sec. 4.3 and the supplementary material, 500 passes.

    Args:
        model: Model to sample from.
        temperature: Factor on the standard deviation of the priors, one or one per scale.
        num_passes: Number of passes; each one moves the running statistics by 5 %.
        batch_size: Number of images per pass.
        seed: Seed of the samples; other random numbers are unaffected.
        progress: Function that shows the progress of a loop; None for a bar on a terminal.

    Raises:
        ValueError: If a number is out of range.
    """
    require_int("recalibration.num_passes", num_passes, 1)
    require_int("recalibration.batch_size", batch_size, 1)
    device = next(model.parameters()).device
    with _restored(model), fork_torch(device):
        torch.manual_seed(seed)
        for norm in _norms(model).values():
            norm.train()
        bar = partial(tqdm, desc="Recalibrating batch norm", leave=False, disable=None)
        for _ in (progress or bar)(range(num_passes)):
            model.sample(batch_size, temperature)
        return {name: value.clone() for name, value in _statistics(model).items()}


def recalibrated(model: NVAE, temperature: Temperature, **counts: Any) -> NVAE:
    """Return a recalibrated model that shares the weights of `model`, which is unchanged.

    Args:
        model: Model to sample from.
        temperature: Factor on the standard deviation of the priors, one or one per scale.
        **counts: Further arguments of :func:`recalibrate`.
    """
    shared = {id(weight): weight for weight in model.parameters()}
    other = copy.deepcopy(model, shared)
    _set_statistics(other, recalibrate(other, temperature, **counts))
    return other


def cached_recalibration(
    model: NVAE, folder: Path, name: str, temperature: Temperature, *, num_passes: int,
    batch_size: int, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the result of :func:`recalibrate`, measured once per model and settings.

    It is cached in `folder`, in a file whose name begins with `name`.
    """
    scales = [temperature] if isinstance(temperature, int | float) else temperature
    device = next(model.parameters()).device
    precision = ""  # statistics in the 16 bits of autocast differ
    if torch.is_autocast_enabled(device.type):
        precision = f"-{torch.get_autocast_dtype(device.type)}".replace("torch.", "")
    written = "-".join(f"{value:g}" for value in scales)
    settings = list(scales), num_passes, batch_size, seed, precision
    cache = TensorCache(
        folder / f"{name}.bn-t{written}{precision}.safetensors",
        hash_of(settings, model.state_dict().items()),
    )
    if (known := cache.read()) is not None:
        return {key: value.to(device) for key, value in known.items()}
    statistics = recalibrate(
        model, temperature, num_passes=num_passes, batch_size=batch_size, seed=seed
    )
    cache.write({key: value.cpu() for key, value in statistics.items()})
    return statistics
