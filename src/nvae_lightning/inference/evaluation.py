"""Bound and log-likelihood of a model on a split, by Lightning."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nvae_lightning.inference.batches import ImageModule, Images
from nvae_lightning.model import NVAE, Inference
from nvae_lightning.model.normalization import mean_over_ranks
from nvae_lightning.objective import ELBO, active_channels, bits_per_dim, channel_rates, elbo


class EvaluationModule(ImageModule):
    """NVAE whose bound, and in a test whose log-likelihood, is measured.

    All means are those of the whole split, however many devices share it. With several data
    loaders in a stage Lightning appends the loader's number to the name of each mean, as in
    ``val/elbo/dataloader_idx_1``; active channels, standard error and number of images are those
    of all the loaders together.

    Args:
        model: what is evaluated.
        num_importance_samples: samples per image of the log-likelihood in tests and predictions.
        memory_budget: bytes for them at one time; see :meth:`NVAE.log_weights`.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        model: NVAE,
        *,
        num_importance_samples: int = 10,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(model)
        if num_importance_samples < 1:
            raise ValueError(
                f"num_importance_samples must be at least 1, got {num_importance_samples}"
            )
        self.num_importance_samples = num_importance_samples
        self.memory_budget = memory_budget
        self._channel_rates: list[Tensor] = []
        self._nlls: list[Tensor] = []
        self._num_evaluated = 0

    def on_validation_epoch_start(self) -> None:
        """Forget what an earlier evaluation has counted."""
        self._channel_rates, self._nlls, self._num_evaluated = [], [], 0

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the bound of one batch."""
        self._evaluate("val", self._input(batch, "val", dataloader_idx))

    def on_validation_epoch_end(self) -> None:
        """Log the active channels of the split."""
        self._log_active_channels("val")

    def test_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the bound and the importance-weighted log-likelihood of one batch."""
        x = self._input(batch, "test", dataloader_idx)
        self._evaluate("test", x)
        nlls = -self._log_likelihood(x)
        nll = nlls.mean()
        metrics = {"test/nll": nll, "test/nll_bpd": bits_per_dim(nll, self.model.image.num_dims)}
        self.log_dict(metrics, **self._average(x))
        self._nlls.append(nlls)

    def predict_step(
        self, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> Float[Tensor, " batch"]:
        """Return the importance-weighted log-likelihood of each image, in nats.

        ``torch.cat(trainer.predict(module, loader))`` is that of all images, in their order.
        """
        return self._log_likelihood(self._input(batch, "predict", dataloader_idx))

    def _log_likelihood(self, x: Images) -> Float[Tensor, " batch"]:
        return self.model.log_likelihood(
            x, self.num_importance_samples, memory_budget=self.memory_budget
        )

    def on_test_epoch_end(self) -> None:
        """Log what is of the split as a whole, and the step, which loggers else count anew."""
        self._log_active_channels("test")
        nlls = torch.cat(self._nlls)
        on_mps = nlls.device.type == "mps"
        nlls = nlls.to(torch.float32 if on_mps else torch.float64)
        moments = torch.stack([torch.ones_like(nlls), nlls, nlls.square()]).sum(1)
        count, total, squares = (mean_over_ranks(moments) * self.trainer.world_size).unbind()
        # Images differ by far more than their mean is uncertain: nothing cancels here.
        variance = (squares - total.square() / count).clamp_min(0) / (count - 1).clamp_min(1)
        error = (variance / count).sqrt().float()
        self.log("test/nll_standard_error", error, sync_dist=True)
        self.log("test/num_images", count.float(), sync_dist=True)
        self.log("step", float(self.global_step), sync_dist=True)

    def _infer(self, x: Images) -> tuple[Inference, ELBO]:
        inference = self.model.infer(x)
        return inference, elbo(inference, x)

    def _means(self, stage: str, terms: ELBO) -> dict[str, Tensor]:
        bound = terms.value.detach().mean()
        return {
            f"{stage}/elbo": bound,
            f"{stage}/bpd": torch.as_tensor(bits_per_dim(-bound, self.model.image.num_dims)),
            f"{stage}/distortion": terms.distortion.detach().mean(),
            f"{stage}/rate": terms.rate.detach().sum(0).mean(),
            **by_group(f"{stage}/kl_group", terms.rate.detach().mean(1)),
        }

    def _evaluate(self, stage: str, x: Images) -> None:
        inference, terms = self._infer(x)
        metrics = self._means(stage, terms)
        average = self._average(x)
        self.log(f"{stage}/bpd", metrics.pop(f"{stage}/bpd"), prog_bar=True, **average)
        self.log_dict(metrics, **average)
        rates = torch.stack([channel_rates(latent) for latent in inference.latents]) * len(x)
        self._channel_rates.append(rates)
        self._num_evaluated += len(x)

    def _average(self, x: Images) -> dict[str, Any]:
        # Times the ranks, as Lightning 2.6 rounds the mean of the ranks' sums of it down.
        return {"batch_size": len(x) * self.trainer.world_size, "sync_dist": True}

    def _log_active_channels(self, stage: str) -> None:
        # Of the whole split: ranks may have batches of different sizes and numbers.
        total = torch.stack(self._channel_rates).sum(0)
        count = total.new_full((1,), self._num_evaluated)
        rates = mean_over_ranks(total) / mean_over_ranks(count)
        actives = torch.stack([active_channels(group).float() for group in rates])
        self.log_dict(by_group(f"{stage}/active_channels", actives), sync_dist=True)


def by_group(name: str, values: Float[Tensor, " group"]) -> dict[str, Tensor]:
    """Name the values of the groups, coarsest first."""
    return {f"{name}/{index:02d}": value for index, value in enumerate(values.unbind())}
