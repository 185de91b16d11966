"""ELBO and log-likelihood of a model on a split, with Lightning."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nvae_lightning.inference.batches import ImageModule, Images
from nvae_lightning.inference.metrics import Statistics, metrics
from nvae_lightning.model import NVAE, Inference
from nvae_lightning.model.normalization import mean_over_ranks
from nvae_lightning.objective import bits_per_dim, elbo
from nvae_lightning.utilities.image import require_int


class _Batch(NamedTuple):
    """Sums of a batch's `Statistics` over its images; in a test, also their NLLs."""

    num_images: int
    sums: list[Tensor]
    nlls: Tensor | None = None


class EvaluationModule(ImageModule):
    """Measurement of the ELBO and, in a test, of the importance-weighted log-likelihood.

    All metrics cover the whole split, on any number of devices. With several data loaders in a
    stage, the metrics of each loader are also logged, under Lightning's names:
    ``val/elbo/dataloader_idx_1``.

    Args:
        model: Model to evaluate.
        num_importance_samples: Samples per image of the log-likelihood in tests and predictions.
        memory_budget: Bytes available for these samples; see :meth:`NVAE.log_weights`.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        model: NVAE,
        *,
        num_importance_samples: int = 10,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(model)
        require_int("num_importance_samples", num_importance_samples, 1)
        self.num_importance_samples = num_importance_samples
        self.memory_budget = memory_budget
        self._batches: defaultdict[int, list[_Batch]] = defaultdict(list)  # by data loader

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        self._batches.clear()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure the ELBO of a batch."""
        x = self._input(batch, "val", dataloader_idx)
        self._batches[dataloader_idx].append(_Batch(len(x), self._sums(x)))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of every split."""
        self._log_splits("val")

    def test_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure the ELBO and the log-likelihood of a batch."""
        x = self._input(batch, "test", dataloader_idx)
        sums = self._sums(x)
        self._batches[dataloader_idx].append(_Batch(len(x), sums, -self._log_likelihood(x)))

    def on_test_epoch_end(self) -> None:
        """Log the metrics of every split and the step, which loggers would count from 0."""
        self._log_splits("test")
        self.log("step", float(self.global_step), sync_dist=True)

    def predict_step(
        self, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> Float[Tensor, " batch"]:
        """Return the importance-weighted log-likelihood of each image, in nats.

        ``torch.cat(trainer.predict(module, loader))`` contains the values of all images in order.
        """
        return self._log_likelihood(self._input(batch, "predict", dataloader_idx))

    def _log_likelihood(self, x: Images) -> Float[Tensor, " batch"]:
        return self.model.log_likelihood(
            x, self.num_importance_samples, memory_budget=self.memory_budget
        )

    def _infer(self, x: Images) -> Inference:
        return self.model.infer(x)

    def _sums(self, x: Images) -> list[Tensor]:
        inference = self._infer(x)
        found = Statistics.of(inference, elbo(inference, x))
        return [_wide(value) * len(x) for value in found]

    def _log_splits(self, stage: str) -> None:
        splits = {"": [batch for batches in self._batches.values() for batch in batches]}
        if len(self._batches) > 1:
            splits |= {f"/dataloader_idx_{n}": batches for n, batches in self._batches.items()}
        for suffix, batches in splits.items():
            counts, sums, nlls = zip(*batches, strict=True)
            totals = [torch.stack(values).sum(0) for values in zip(*sums, strict=True)]
            # Ranks may have different numbers of images.
            count = mean_over_ranks(totals[0].new_tensor(sum(counts)))
            means = Statistics(*(mean_over_ranks(value) / count for value in totals))
            found = metrics(means, self.model.image.num_dims)
            if stage == "test":
                found |= self._nll(torch.cat(nlls))
            for name, value in found.items():
                self.log(
                    f"{stage}/{name}{suffix}",
                    value.float(),
                    prog_bar=name == "bpd",
                    sync_dist=True,
                    add_dataloader_idx=False,
                )

    def _nll(self, nlls: Float[Tensor, " image"]) -> dict[str, Tensor]:
        """Return mean, standard error and number of the images' NLLs, over all ranks."""
        nlls = _wide(nlls)
        moments = torch.stack([torch.ones_like(nlls), nlls, nlls.square()]).sum(1)
        count, total, squares = (mean_over_ranks(moments) * self.trainer.world_size).unbind()
        mean = total / count
        # NLLs vary widely between images, so this difference does not cancel.
        variance = (squares - total.square() / count).clamp_min(0) / (count - 1).clamp_min(1)
        return {
            "nll": mean,
            "nll_bpd": torch.as_tensor(bits_per_dim(mean, self.model.image.num_dims)),
            "nll_standard_error": (variance / count).sqrt(),
            "num_images": count,
        }


def _wide(values: Tensor) -> Tensor:
    """Convert to float64, which MPS lacks."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)
