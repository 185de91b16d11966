"""Pictures from a trained model: samples, reconstructions, interpolations and resampled groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from nvae_lightning.backends import GraphedSampler
from nvae_lightning.inference.batches import Images
from nvae_lightning.inference.latents import slerp
from nvae_lightning.inference.recalibration import with_statistics
from nvae_lightning.model import NVAE
from nvae_lightning.model.nvae import Temperature
from nvae_lightning.utilities.image import require_int

_PROGRESS = partial(tqdm, leave=False, disable=None)  # on a terminal only


def batch_sizes(count: int, batch_size: int) -> list[int]:
    """Split a number of images into batches."""
    return [min(batch_size, count - start) for start in range(0, count, batch_size)]


def sample_means(model: NVAE, count: int, batch_size: int, temperature: Temperature) -> Images:
    """Draw the means of p(x | z), batch by batch."""
    sizes = batch_sizes(count, batch_size)
    return torch.cat([model.sample(size, temperature).mean for size in sizes])


@dataclass(frozen=True)
class Drawing:
    """Images in [0, 1], row by row.

    Args:
        images: Images of all rows.
        num_columns: Number of images per row.
    """

    images: Images
    num_columns: int


@dataclass(frozen=True)
class Settings:
    """Settings of all kinds of drawings.

    Args:
        model: Model in evaluation mode.
        num_samples: Number of samples, pairs or images, depending on the kind.
        temperature: Factor on the standard deviation of the priors, one or one per scale.
        load: Function that returns a given number of images to start from.
        batch_size: Number of images per pass.
        statistics: Function that measures the statistics of batch normalisation for samples; None
            keeps the model's own. They are used only if all groups are sampled, not with latents
            inferred from images.

    Raises:
        ValueError: If a number is below 1.
    """

    model: NVAE
    num_samples: int
    temperature: Temperature
    load: Callable[[int], Images]
    batch_size: int
    statistics: Callable[[], Mapping[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        require_int("num_samples", self.num_samples, 1)
        require_int("batch_size", self.batch_size, 1)

    def sample(self, *, cuda_graphs: bool = False) -> Images:
        """Draw images from the prior: means of p(x | z).

        Args:
            cuda_graphs: Whether to use CUDA graphs.

        Raises:
            ValueError: If CUDA graphs are requested without a CUDA device.
        """
        sizes = batch_sizes(self.num_samples, self.batch_size)
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
    """Draw ``num_samples`` images from the prior; see :meth:`Settings.sample`."""
    images = settings.sample(cuda_graphs=cuda_graphs)
    return Drawing(images, math.ceil(math.sqrt(settings.num_samples)))


@torch.no_grad()
def reconstruct(settings: Settings, *, num_pairs_per_row: int = 4) -> Drawing:
    """Reconstruct ``num_samples`` images; each is followed by its reconstruction.

    Args:
        settings: Settings of all kinds.
        num_pairs_per_row: Number of pairs per row.

    Raises:
        ValueError: If the number of pairs is below 1.
    """
    require_int("mode.num_pairs_per_row", num_pairs_per_row, 1)
    x = settings.load(settings.num_samples)
    batches = x.split(batch_sizes(len(x), settings.batch_size))
    bar = _PROGRESS(batches, "Drawing")
    reconstructions = torch.cat([settings.model(batch).likelihood.mean for batch in bar])
    pairs = torch.stack([x, reconstructions], 1).flatten(0, 1)
    return Drawing(pairs, 2 * min(num_pairs_per_row, len(x)))


@torch.no_grad()
def interpolate(settings: Settings, *, num_steps: int = 8) -> Drawing:
    """Interpolate between ``num_samples`` pairs of images, one row each.

    The standardised latents of each group are interpolated by :func:`slerp`.

    Args:
        settings: Settings of all kinds.
        num_steps: Number of images between the two originals of a row, including their
            reconstructions.

    Raises:
        ValueError: If there are fewer than two.
    """
    require_int("mode.num_steps", num_steps, 2)
    model = settings.model
    x = settings.load(2 * settings.num_samples)
    rows = []
    for first, second in _PROGRESS(list(zip(x[0::2], x[1::2], strict=True)), "Drawing"):
        noise = model.noise_of(model.encode(torch.stack([first, second])))
        weights = torch.linspace(0.0, 1.0, num_steps, device=x.device)
        path = [slerp(group[0], group[1], weights) for group in noise]
        between = [
            model.sample(size, noise=[group.split(settings.batch_size)[index] for group in path])
            for index, size in enumerate(batch_sizes(num_steps, settings.batch_size))
        ]
        rows += [first[None], *(likelihood.mean for likelihood in between), second[None]]
    return Drawing(torch.cat(rows), num_steps + 2)


@torch.no_grad()
def resample(settings: Settings, *, keep: Sequence[int] | None = None) -> Drawing:
    """Keep the top groups of an image and resample the others, ``num_samples`` times.

    Each row begins with the image and keeps a different number of groups.

    Args:
        settings: Settings of all kinds.
        keep: Numbers of groups to keep; by default at most ten, from none to all.

    Raises:
        ValueError: If a number is negative or exceeds the number of groups.
    """
    model, num_groups = settings.model, settings.model.hierarchy.num_groups
    if keep is None:
        counts = torch.linspace(0, num_groups, min(10, num_groups + 1))
        keep = counts.round().int().tolist()
    for count in keep:
        if not 0 <= count <= num_groups:
            raise ValueError(
                f"mode.keep: got {count}, but the model has {num_groups} groups; "
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
        for size in batch_sizes(settings.num_samples, settings.batch_size):
            given = [z.expand(size, -1, -1, -1) for z in latents[:count]]
            rows.append(model.decode(given, settings.temperature).mean)
    return Drawing(torch.cat(rows), settings.num_samples + 1)
