"""Training, validation and testing of an NVAE by Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from nvae_lightning.model import NVAE, Inference
from nvae_lightning.objective import (
    ELBO,
    KL,
    Penalty,
    SpectralPenalty,
    active_channels,
    annealed_penalty_weight,
    balance_kl,
    balancing_factors,
    bits_per_dim,
    bn_scale_penalty,
    elbo,
    warmup_cosine,
)


def is_logging_step(trainer: Trainer, step: int) -> bool:
    """Whether loggers take what is logged at the ``step``-th optimiser step, counted from 1."""
    interval: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
    return interval > 0 and step > 0 and step % interval == 0


Images = Float[Tensor, "batch channel height width"]


class NVAEModule(LightningModule):
    r"""NVAE with its objective and optimiser.

    .. math::
        loss = E\left[-\log p(x|z) + \beta \sum_l \gamma_l KL_l\right]
               + \lambda \left(\sum_i s_i + \sum_j \max|\gamma_j|\right)

    Source: Vahdat & Kautz 2020, Sec. 3.2 and A.

    Args:
        model: what is trained.
        kl: how the KL of the groups enters the loss.
        penalty: penalties on the weights.
        optimizer: constructor of the optimiser, given the parameters.
        final_learning_rate: learning rate at the end of the training.
        warmup_epochs: epochs over which the learning rate rises; in trainings so short that this
            would be more than a tenth of their steps, a tenth.
        num_importance_samples: samples per image of the test log-likelihood.

    Raises:
        ValueError: if a number is out of range.
    """

    size_factor: Tensor | None

    def __init__(
        self,
        model: NVAE,
        *,
        kl: KL,
        penalty: Penalty,
        optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
        final_learning_rate: int | float,
        warmup_epochs: int | float,
        num_importance_samples: int = 10,
    ) -> None:
        super().__init__()
        for name, value, minimum in (
            ("final_learning_rate", final_learning_rate, 0),
            ("warmup_epochs", warmup_epochs, 0),
            ("num_importance_samples", num_importance_samples, 1),
        ):
            if value < minimum:
                raise ValueError(f"module.{name} must be at least {minimum}, got {value}")
        self.model = model.to(memory_format=torch.channels_last)
        self.kl = kl
        self.penalty = penalty
        self.optimizer = optimizer
        self.final_learning_rate = final_learning_rate
        self.warmup_epochs = warmup_epochs
        self.num_importance_samples = num_importance_samples
        self.spectral_penalty = SpectralPenalty(model) if penalty.spectral else None
        factors = None if kl.size_factor is None else kl.size_factor(model.hierarchy)
        self.register_buffer("size_factor", factors, persistent=False)
        self.total_steps = 0

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimiser, and the learning rate from the length of the training."""
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise ValueError(
                "trainer.max_steps and trainer.max_epochs leave the training without an end, "
                "which its schedules need: set one of them"
            )
        self.total_steps = int(total_steps)
        optimizer = self.optimizer(self.model.parameters())
        peak = optimizer.param_groups[0]["lr"]
        if peak <= 0.0:
            raise ValueError(f"optimizer.lr must be positive, got {peak}")
        self.trainer.fit_loop.setup_data()  # or the number of batches may not be known yet
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warmup_steps = min(round(self.warmup_epochs * steps_per_epoch), self.total_steps // 10)

        def factor(step: int) -> float:
            rate = warmup_cosine(
                step,
                peak=peak,
                final=self.final_learning_rate,
                warmup_steps=warmup_steps,
                total_steps=self.total_steps,
            )
            # Which may be another one after a resume with another learning rate.
            return rate / optimizer.param_groups[0]["initial_lr"]

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _as_input(self, x: Images) -> Images:
        # Of the model's number format, and laid out as convolutions are fastest.
        return x.to(self.dtype, memory_format=torch.channels_last)

    def _infer(self, x: Images) -> tuple[Inference, ELBO]:
        inference = self.model(x)
        return inference, elbo(inference, x)

    def training_step(self, x: Images, batch_idx: int) -> Tensor:
        """Loss of one batch, nats per image."""
        x = self._as_input(x)
        inference, terms = self._infer(x)
        beta = self.kl.beta(self.global_step, self.total_steps)
        weight = annealed_penalty_weight(
            beta, initial=self.penalty.initial_weight, final=self.penalty.weight
        )
        loss = (terms.distortion + balance_kl(terms.rate, self.size_factor, beta)).mean()
        penalties = {}
        if self.spectral_penalty is not None:
            penalties["train/spectral"] = self.spectral_penalty()
        if self.penalty.bn_scale:
            penalties["train/bn_scale"] = bn_scale_penalty(self.model)
        for value in penalties.values():
            loss = loss + weight * value
        if self._is_logging_step:
            self._log_terms("train", inference, terms)
            metrics = {"train/loss": loss, "train/beta": beta, "train/penalty_weight": weight}
            self.log_dict({**metrics, **penalties}, batch_size=len(x))
            if self.size_factor is not None and beta < 1.0:
                balance = balancing_factors(terms.rate, self.size_factor)
            else:
                balance = torch.ones(len(terms.rate))
            self.log_dict(_by_group("train/kl_balance", balance), batch_size=len(x))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradient that the optimiser is about to use."""
        if self._is_logging_step:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

    def validation_step(self, x: Images, batch_idx: int) -> None:
        """Log the bound of one batch."""
        x = self._as_input(x)
        inference, terms = self._infer(x)
        self._log_terms("val", inference, terms)

    def test_step(self, x: Images, batch_idx: int) -> None:
        """Log the bound and the importance-weighted log-likelihood of one batch."""
        x = self._as_input(x)
        inference, terms = self._infer(x)
        self._log_terms("test", inference, terms)
        nll = -self.model.log_likelihood(x, self.num_importance_samples).mean()
        metrics = {"test/nll": nll, "test/nll_bpd": bits_per_dim(nll, self.model.image.num_dims)}
        self.log_dict(metrics, batch_size=len(x), sync_dist=True)

    @property
    def _is_logging_step(self) -> bool:
        # Numbers cost a wait for the device, so they are made only where a logger takes them.
        return is_logging_step(self.trainer, self.global_step + 1)

    def _log_terms(self, stage: str, inference: Inference, terms: ELBO) -> None:
        bound = terms.value.mean()
        metrics = {
            f"{stage}/elbo": bound,
            f"{stage}/distortion": terms.distortion.mean(),
            f"{stage}/rate": terms.rate.sum(0).mean(),
            **_by_group(f"{stage}/kl_group", terms.rate.mean(1)),
            **{
                f"{stage}/active_channels/{index:02d}": active_channels(latent).float()
                for index, latent in enumerate(inference.latents)
            },
        }
        average = {"batch_size": len(terms.distortion), "sync_dist": stage != "train"}
        self.log_dict(metrics, **average)
        bpd = bits_per_dim(-bound, self.model.image.num_dims)
        self.log(f"{stage}/bpd", bpd, prog_bar=True, **average)


def _by_group(name: str, values: Float[Tensor, " group"]) -> dict[str, Tensor]:
    return {f"{name}/{index:02d}": value for index, value in enumerate(values.unbind())}
