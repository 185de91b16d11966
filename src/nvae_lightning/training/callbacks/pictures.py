"""Pictures of samples and reconstructions."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from nvae_lightning.inference.batches import fork_torch, images_of
from nvae_lightning.inference.sampling import sample_means
from nvae_lightning.training.module import NVAEModule
from nvae_lightning.utilities.image import require_int
from nvae_lightning.utilities.images import write_grid


def log_picture(trainer: Trainer, name: str, path: Path) -> None:
    """Pass a picture to the loggers that support pictures."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pil_to_tensor(picture), trainer.global_step)


class Pictures(Callback):
    """Write ``samples.png`` and ``reconstructions.png`` after every validation and the test.

    Loggers receive them as ``val/samples``, ``test/samples`` and so on.

    Samples are the means of p(x | z). Reconstructions are to the right of their originals. The
    noise is the same each time, so that the pictures of a run are comparable.

    Args:
        num_images: Number of images per picture.
        temperature: Factor on the standard deviation of the priors.
        seed: Seed of the noise.

    Raises:
        ValueError: If there are fewer than two images or the temperature is negative.
    """

    def __init__(self, num_images: int = 64, temperature: float = 1.0, seed: int = 0) -> None:
        require_int("callbacks.pictures.num_images", num_images, 2)
        if not 0.0 <= temperature < math.inf:
            raise ValueError(
                "callbacks.pictures.temperature must be finite and not negative, got "
                f"{temperature}"
            )
        self.num_images = num_images
        self.temperature = temperature
        self.seed = seed
        self._images: list[Tensor] = []
        self._chunk = 1

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Collect a few images."""
        self._keep(batch, batch_idx, trainer.num_val_batches[dataloader_idx])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, except in the sanity check."""
        if not trainer.sanity_checking:
            self._draw(trainer, pl_module, "val")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Collect a few images."""
        self._keep(batch, batch_idx, trainer.num_test_batches[dataloader_idx])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the finished model's pictures."""
        self._draw(trainer, pl_module, "test")

    def _keep(self, batch: object, batch_idx: int, num_batches: int | float) -> None:
        """Collect images from all over the split, which may be sorted by class."""
        images = images_of(batch)
        if batch_idx == 0:
            self._images, self._chunk = [], len(images)
        num_wanted = self.num_images // 2
        if math.isinf(num_batches):  # a split of unknown length: collect the first images
            count = num_wanted - len(self._images)
        else:  # distribute them evenly over the batches
            share = num_wanted / num_batches
            count = int((batch_idx + 1) * share) - int(batch_idx * share)
        if count := min(count, len(images)):
            self._images += images[torch.linspace(0, len(images) - 1, count).long()].unbind()

    @rank_zero_only
    def _draw(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, NVAEModule)
        model = pl_module.model
        images = torch.stack(self._images[: self.num_images // 2]).to(pl_module.dtype)
        was_training = model.training
        model.eval()
        # The pictures must not shift the random numbers of the training.
        with fork_torch(images.device), torch.no_grad():
            torch.manual_seed(self.seed)
            # In chunks of a batch, a size that is known to fit into memory.
            samples = sample_means(model, self.num_images, self._chunk, self.temperature)
            reconstructions = torch.cat(
                [model(chunk).likelihood.mean for chunk in images.split(self._chunk)]
            )
        model.train(was_training)
        pairs = torch.stack([images, reconstructions], 1).flatten(0, 1)
        for name, pictures in (("samples", samples), ("reconstructions", pairs)):
            path = Path(trainer.default_root_dir) / f"{name}.png"
            write_grid(pictures, 8, path)
            log_picture(trainer, f"{stage}/{name}", path)
