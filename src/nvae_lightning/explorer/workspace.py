"""What all tabs share: one model, test images and limits. Nothing in it belongs to a session."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvae_lightning.data.dataset import ImageDataset
from nvae_lightning.data.decode import Decoder, decode_file
from nvae_lightning.data.transforms import binarize, quantize
from nvae_lightning.inference.batches import fork_torch
from nvae_lightning.inference.latents import draw_noise
from nvae_lightning.inference.recalibration import recalibrated
from nvae_lightning.model import NVAE, Inference
from nvae_lightning.utilities.images import grid
from nvae_lightning.utilities.live_bytes import peak_bytes

#: Maximum size of an uploaded file.
MOST_UPLOADED_BYTES = 20 << 20

_MOST_RECALIBRATED = 8  # models kept, of which each has its own statistics and no weights
_NUM_IMPORTANCE_SAMPLES = 10


def generator(seed: int) -> torch.Generator:
    """Return a source of random numbers for one request."""
    return torch.Generator().manual_seed(int(seed))


def picture(images: Tensor, num_columns: int) -> np.ndarray:
    """Arrange images row by row, as the commands do."""
    return grid(images, num_columns).permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class Workspace:
    """Model, test images and limits.

    Args:
        model: Model, used in evaluation mode and never changed.
        test_set: Test images in the model's format; None if there are none.
        memory_budget: Maximum number of bytes that one request may use.
        num_reference_images: Number of test images in the histogram of likelihoods.
        num_passes: Number of passes of a recalibration.
        precision: Function that returns the context of computations.
    """

    model: NVAE
    test_set: ImageDataset | None = None
    memory_budget: int = 2 << 30
    num_reference_images: int = 100
    num_passes: int = 100
    precision: Callable[[], AbstractContextManager[object]] = nullcontext
    _recalibrated: OrderedDict[tuple[float, ...], NVAE] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.model.eval()

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    @property
    def num_groups(self) -> int:
        """Number of latent groups."""
        return self.model.hierarchy.num_groups

    @cached_property
    def most_images(self) -> int:
        """Number of images per request that fit into the budget, measured with one image."""
        image = self.model.image
        x = torch.zeros(1, image.channels, image.size, image.size, device=self.device)
        noise = [torch.zeros(1, *s, device=self.device) for s in self.model.latent_shapes]
        with torch.no_grad(), self.precision():
            return self.memory_budget // peak_bytes(lambda: self.model(x, noise))

    def check_fits(self, name: str, num_images: int) -> None:
        """Refuse a request that takes too much memory.

        Raises:
            ValueError: If that many images do not fit into the memory budget.
        """
        if not 1 <= num_images <= self.most_images:
            raise ValueError(
                f"{name}: got {num_images:,}, but it must be from 1 to {self.most_images:,}, "
                f"which fit into memory_budget={self.memory_budget:,} bytes; choose fewer, or "
                "start the page with a larger memory_budget"
            )

    def read(self, file: str | None, random: torch.Generator) -> Tensor:
        """Read an uploaded or a test image as the model's input.

        Args:
            file: Path of the file.
            random: Source of random numbers, for binary images.

        Raises:
            ValueError: If there is none, or it is too large, damaged or in an unknown format.
        """
        if file is None:
            raise ValueError("image: got none; upload one, or choose a test image")
        path, image = Path(file), self.model.image
        if (size := path.stat().st_size) > MOST_UPLOADED_BYTES:
            raise ValueError(
                f"image: got {size:,} bytes, but it must have at most {MOST_UPLOADED_BYTES:,}; "
                "shrink it"
            )
        pixels = decode_file(path.read_bytes(), path.name, Decoder(image.size, image.channels))
        x = binarize(pixels, random) if image.bits == 1 else quantize(pixels, image.bits)
        return x.to(self.device)

    def infer(self, file: str | None, seed: int) -> tuple[Tensor, Inference]:
        """Read an image and infer its latents."""
        random = generator(seed)
        x = self.read(file, random)
        return x, self.model(x, draw_noise(self.model, 1, random))

    def test_picture(self, index: int) -> np.ndarray:
        """Return the pixels of a test image, with 8 bits."""
        assert self.test_set is not None
        pixels = self.test_set[int(index)].permute(1, 2, 0).numpy()
        return pixels[..., 0] if pixels.shape[2] == 1 else pixels

    def sampler(
        self, temperature: list[float], progress: Callable[[range], Iterable[int]] | None = None
    ) -> NVAE:
        """Return the model with batch normalisation recalibrated for a temperature, cached."""
        key = tuple(temperature)
        if key not in self._recalibrated:
            counts = {"num_passes": self.num_passes, "progress": progress}
            self._recalibrated[key] = recalibrated(self.model, temperature, **counts)
        self._recalibrated.move_to_end(key)
        if len(self._recalibrated) > _MOST_RECALIBRATED:
            self._recalibrated.popitem(last=False)
        return self._recalibrated[key]

    @cached_property
    def reference(self) -> Tensor | None:
        """Log-likelihoods of the first test images in nats, without a dataset None."""
        if self.test_set is None:
            return None
        count = min(self.num_reference_images, len(self.test_set))
        pixels = self.test_set.__getitems__(list(range(count)))
        bits = self.model.image.bits
        x = binarize(pixels, generator(0)) if bits == 1 else quantize(pixels, bits)
        return self.log_likelihood(x.to(self.device), seed=0)

    def log_likelihood(self, x: Tensor, seed: int) -> Tensor:
        """Return importance-weighted bounds in nats, with random numbers of their own."""
        with fork_torch(self.device):
            torch.manual_seed(seed)
            budget = self.memory_budget
            return self.model.log_likelihood(
                x, _NUM_IMPORTANCE_SAMPLES, memory_budget=min(budget, 1 << 28)
            )
