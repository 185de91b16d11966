"""Pictures from a trained model: samples, reconstructions, interpolations and resampled groups."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from nvae_lightning.backends import GraphedSampler
from nvae_lightning.model import NVAE
from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.model.nvae import Temperature

Images = Float[Tensor, "count channel height width"]

_PROGRESS = partial(tqdm, leave=False, disable=None)  # on a terminal only


# ------------------------------------------------------------------------- batch normalisation


def _buffers(model: NVAE) -> dict[str, Tensor]:
    """Statistics of batch normalisation that sampling depends on."""
    return {
        f"{name}.{kind}": value
        for name, module in model.decoder.named_modules()
        if isinstance(module, BatchNorm)
        for kind, value in module.named_buffers()
    }


@contextmanager
def _kept(model: NVAE) -> Iterator[None]:
    """Put the statistics of batch normalisation, and whether it trains, back at the end."""
    before = {name: value.clone() for name, value in _buffers(model).items()}
    norms = [module for module in model.decoder.modules() if isinstance(module, BatchNorm)]
    were_training = [norm.training for norm in norms]
    try:
        yield
    finally:
        for norm, was_training in zip(norms, were_training, strict=True):
            norm.train(was_training)
        for name, value in _buffers(model).items():
            value.copy_(before[name])


@contextmanager
def with_statistics(model: NVAE, statistics: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model have other statistics of batch normalisation for a while, then its own."""
    with _kept(model):
        for name, value in _buffers(model).items():
            value.copy_(statistics[name])
        yield


@torch.no_grad()
def recalibrate(
    model: NVAE,
    temperature: Temperature = 1.0,
    *,
    num_passes: int = 500,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Measure the statistics of batch normalisation that samples at a temperature have.

    The model itself is left as it is: see :func:`with_statistics`.

    Source: Vahdat & Kautz 2020, Sec. 4.3 and the supplementary material, 500 passes.

    Args:
        model: what is sampled from.
        temperature: factor on the standard deviation of the priors, one or one per scale.
        num_passes: passes; each moves the running statistics by 5 %.
        batch_size: images per pass.
        seed: of the samples; other random numbers are left alone.

    Raises:
        ValueError: if a number is out of range.
    """
    for name, value in (("num_passes", num_passes), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"recalibration: {name} must be at least 1, got {value}")
    device = next(model.parameters()).device
    with _kept(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for module in model.decoder.modules():
            if isinstance(module, BatchNorm):
                module.train()
        for _ in _PROGRESS(range(num_passes), "Recalibrating batch normalisation"):
            model.sample(batch_size, temperature)
        return {name: value.clone() for name, value in _buffers(model).items()}


def cached_recalibration(
    model: NVAE, folder: Path, name: str, temperature: Temperature, *, num_passes: int,
    batch_size: int, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """As :func:`recalibrate`, but measured once per model, temperature and settings.

    The statistics are kept in ``folder``, in a file of their own. Those of activations in the 16
    bits of autocast are others.

    Args:
        model: see there.
        folder: where to keep them.
        name: what the file's name begins with.
        temperature: see there.
        num_passes: see there.
        batch_size: see there.
        seed: see there.

    Raises:
        ValueError: see there.
    """
    scales = [temperature] if isinstance(temperature, int | float) else temperature
    device = next(model.parameters()).device
    precision = ""
    if torch.is_autocast_enabled(device.type):
        precision = f"-{torch.get_autocast_dtype(device.type)}".replace("torch.", "")
    written = "-".join(f"{value:g}" for value in scales)
    file = folder / f"{name}.bn-t{written}{precision}.safetensors"
    digest = hashlib.sha256(repr((list(scales), num_passes, batch_size, seed, precision)).encode())
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    fingerprint = digest.hexdigest()
    try:
        with safe_open(file, "pt") as stored:
            if (stored.metadata() or {}).get("fingerprint") == fingerprint:
                return {key: stored.get_tensor(key).to(device) for key in stored.keys()}
    except (OSError, SafetensorError):
        pass  # none there yet, or not a whole one
    statistics = recalibrate(
        model, temperature, num_passes=num_passes, batch_size=batch_size, seed=seed
    )
    partial_file = file.with_name(f".{file.name}.{os.getpid()}.partial")
    tensors = {key: value.cpu() for key, value in statistics.items()}
    try:
        save_file(tensors, partial_file, metadata={"fingerprint": fingerprint})
        partial_file.replace(file)
    except OSError as error:
        print(f"the statistics are not kept: {error}")
    return statistics


# ----------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Drawing:
    """Images in [0, 1], row by row.

    Args:
        images: all of them.
        num_columns: images per row.
    """

    images: Images
    num_columns: int


@dataclass(frozen=True)
class Settings:
    """What all kinds of drawings are made by.

    Args:
        model: what draws, in evaluation mode.
        num_samples: how many; of what, each kind says.
        temperature: factor on the standard deviation of the priors, one or one per scale.
        load: given a number, returns that many images to begin with.
        batch_size: images per pass.
        statistics: measures those of batch normalisation that samples have; None leaves samples
            to the model's own. They are for what is drawn from the prior as a whole: what is
            inferred from images has the model's own.

    Raises:
        ValueError: if there is nothing to draw.
    """

    model: NVAE
    num_samples: int
    temperature: Temperature
    load: Callable[[int], Images]
    batch_size: int
    statistics: Callable[[], Mapping[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        for name, value in (("num_samples", self.num_samples), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def sizes(self, count: int) -> list[int]:
        """Split a number of images into batches."""
        return [min(self.batch_size, count - start) for start in range(0, count, self.batch_size)]

    def sample(self, *, cuda_graphs: bool = False) -> Images:
        """Draw images from the prior: means of p(x | z).

        Args:
            cuda_graphs: whether batches are drawn by CUDA graphs.

        Raises:
            ValueError: if graphs are to draw without a CUDA device.
        """
        sizes = self.sizes(self.num_samples)
        draws = {size: self._draw_of(size, cuda_graphs) for size in sizes}
        other = None if self.statistics is None else self.statistics()
        with nullcontext() if other is None else with_statistics(self.model, other):
            return torch.cat([draws[size]() for size in _PROGRESS(sizes, "Drawing")])

    def _draw_of(self, size: int, cuda_graphs: bool) -> Callable[[], Images]:
        if cuda_graphs:
            return GraphedSampler(self.model, size, self.temperature)
        return lambda: self.model.sample(size, self.temperature).mean


@torch.no_grad()
def prior(settings: Settings, *, cuda_graphs: bool = False) -> Drawing:
    """Draw ``num_samples`` images from the prior.

    Args:
        settings: see there.
        cuda_graphs: whether batches are drawn by CUDA graphs.

    Raises:
        ValueError: if graphs are to draw without a CUDA device.
    """
    images = settings.sample(cuda_graphs=cuda_graphs)
    return Drawing(images, math.ceil(math.sqrt(settings.num_samples)))


@torch.no_grad()
def reconstruct(settings: Settings, *, num_pairs_per_row: int = 4) -> Drawing:
    """Reconstruct ``num_samples`` images; each is followed by its reconstruction.

    Args:
        settings: see there.
        num_pairs_per_row: of the drawing.

    Raises:
        ValueError: if that is below 1.
    """
    if num_pairs_per_row < 1:
        raise ValueError(f"mode.num_pairs_per_row must be at least 1, got {num_pairs_per_row}")
    x = settings.load(settings.num_samples)
    batches = x.split(settings.sizes(len(x)))
    bar = _PROGRESS(batches, "Drawing")
    reconstructions = torch.cat([settings.model(batch).likelihood.mean for batch in bar])
    pairs = torch.stack([x, reconstructions], 1).flatten(0, 1)
    return Drawing(pairs, 2 * min(num_pairs_per_row, len(x)))


@torch.no_grad()
def interpolate(settings: Settings, *, num_steps: int = 8) -> Drawing:
    r"""Interpolate between ``num_samples`` pairs of images, one row each.

    What is interpolated are the standard-normal numbers of each group, spherically:
    between two of them, linear interpolation would come nearer to 0 than samples do.

    .. math::
        \epsilon(w) = \left((1 - w) \|\epsilon_0\| + w \|\epsilon_1\|\right)
        \frac{\sin((1 - w) \omega) e_0 + \sin(w \omega) e_1}{\sin \omega}, \quad
        e_i = \epsilon_i / \|\epsilon_i\|

    Source: Shoemake 1985, for the direction; lengths are interpolated linearly.

    Args:
        settings: see there.
        num_steps: images per row, the ends included, besides the two originals at its ends.

    Raises:
        ValueError: if there are fewer than two.
    """
    if num_steps < 2:
        raise ValueError(f"mode.num_steps must be at least 2, got {num_steps}")
    model = settings.model
    x = settings.load(2 * settings.num_samples)
    rows = []
    for first, second in _PROGRESS(list(zip(x[0::2], x[1::2], strict=True)), "Drawing"):
        noise = model.noise_of(model.encode(torch.stack([first, second])))
        weights = torch.linspace(0.0, 1.0, num_steps, device=x.device)
        path = [_slerp(group[0], group[1], weights) for group in noise]
        between = [
            model.sample(size, noise=[group.split(settings.batch_size)[index] for group in path])
            for index, size in enumerate(settings.sizes(num_steps))
        ]
        rows += [first[None], *(likelihood.mean for likelihood in between), second[None]]
    return Drawing(torch.cat(rows), num_steps + 2)


def _slerp(first: Tensor, second: Tensor, weights: Float[Tensor, " step"]) -> Tensor:
    by_step = weights.view(-1, *[1] * first.dim())
    lengths = first.norm(), second.norm()
    directions = first / lengths[0], second / lengths[1]
    angle = (directions[0] * directions[1]).sum().clamp(-1.0, 1.0).acos()
    length = torch.lerp(lengths[0], lengths[1], by_step)
    if angle.sin() < 1e-4:  # nearly one direction, or opposite ones
        return torch.lerp(first, second, by_step)
    from_first = torch.sin((1.0 - by_step) * angle) * directions[0]
    return length * (from_first + torch.sin(by_step * angle) * directions[1]) / angle.sin()


@torch.no_grad()
def resample(settings: Settings, *, keep: Sequence[int] | None = None) -> Drawing:
    """Keep the top groups of an image and draw the others anew ``num_samples`` times.

    Each row begins with the image, and keeps another number of groups.

    Args:
        settings: see there.
        keep: those numbers; if None, from none to all, at most ten of them.

    Raises:
        ValueError: if one is negative or more than there are groups.
    """
    model, num_groups = settings.model, settings.model.hierarchy.num_groups
    if keep is None:
        counts = torch.linspace(0, num_groups, min(10, num_groups + 1))
        keep = counts.round().int().tolist()
    for count in keep:
        if not 0 <= count <= num_groups:
            raise ValueError(
                f"mode.keep: got {count}, but the model has {num_groups} groups: "
                f"give numbers from 0 to {num_groups}"
            )
    x = settings.load(1)
    latents = model.encode(x)
    rows = []
    for count in keep:
        rows.append(x)
        if count == 0:
            rows.append(settings.sample())
            continue
        for size in settings.sizes(settings.num_samples):
            given = [z.expand(size, -1, -1, -1) for z in latents[:count]]
            rows.append(model.decode(given, settings.temperature).mean)
    return Drawing(torch.cat(rows), settings.num_samples + 1)
