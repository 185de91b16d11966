"""Training of an NVAE by Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from os import PathLike
from textwrap import shorten
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from nvae_lightning.backends import cuda_graphs as graphs
from nvae_lightning.inference.batches import Images
from nvae_lightning.inference.evaluation import EvaluationModule, by_group
from nvae_lightning.model import NVAE
from nvae_lightning.model.normalization import mean_over_ranks
from nvae_lightning.objective import (
    ELBO,
    KL,
    Penalty,
    SpectralPenalty,
    active_channels,
    annealed_penalty_weight,
    balance_kl,
    balancing_factors,
    bn_scale_penalty,
    channel_rates,
    warmup_cosine,
)
from nvae_lightning.serialization.architecture import ARCHITECTURE, restore
from nvae_lightning.serialization.torch_files import read_torch_file
from nvae_lightning.serialization.weights import build, check_sizes, weights_of
from nvae_lightning.training.hyperparameters import (
    HYPERPARAMETERS,
    describe_training,
    restore_training,
)

Module = TypeVar("Module", bound="NVAEModule")
Optimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]

#: The paper's settings, those that most of its datasets share.
BALANCED = KL()
PENALISED = Penalty()
ADAMAX = partial(torch.optim.Adamax, lr=1e-2, eps=1e-3, weight_decay=3e-4, foreach=True)


class _Loss(NamedTuple):
    """The loss of a batch and, for those who watch, what it is made of."""

    loss: Tensor
    distortion: Float[Tensor, " batch"]
    rate: Float[Tensor, "group batch"]
    channel_rates: Float[Tensor, "group channel"]
    penalties: Float[Tensor, " penalty"]


def is_logging_step(trainer: Trainer, step: int) -> bool:
    """Whether loggers take what is logged at the ``step``-th optimiser step, counted from 1."""
    interval: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
    return interval > 0 and step > 0 and step % interval == 0


def check_cuda_graphs(trainer: Trainer) -> None:
    """Check that the steps of a training can be CUDA graphs.

    Raises:
        ValueError: if they are on no CUDA device, on several, or of several batches.
    """
    graphs.check_device(trainer.strategy.root_device)
    for name, number in (
        ("devices", trainer.world_size),
        ("accumulate_grad_batches", trainer.accumulate_grad_batches),
    ):
        if number > 1:
            raise ValueError(
                f"cuda_graphs: got true with trainer.{name}={number}, but a step in graphs is "
                f"that of one device and one batch; set trainer.{name}=1, or leave cuda_graphs "
                "out"
            )


class NVAEModule(EvaluationModule):
    r"""NVAE with its objective and optimiser.

    .. math::
        loss = E\left[-\log p(x|z) + \beta \sum_l \gamma_l KL_l\right]
               + \lambda \left(\sum_i s_i + \sum_j \max|\gamma_j|\right)

    Source: Vahdat & Kautz 2020, Sec. 3.2 and A, whose settings are the defaults.

    Batches are images in [0, 1], alone or before their labels in a tuple or list.

    Args:
        model: what is trained.
        kl: how the KL of the groups enters the loss.
        penalty: penalties on the weights.
        optimizer: constructor of the optimiser, given the parameters.
        final_learning_rate: learning rate at the end of the training.
        warmup_epochs: epochs over which the learning rate rises; in trainings so short that this
            would be more than a tenth of their steps, a tenth.
        num_importance_samples: samples per image of the log-likelihood in tests and predictions.
        cuda_graphs: whether the loss and its gradients are computed by CUDA graphs, at less cost
            to the host: on one CUDA device, a batch per step.

    Attributes:
        penalty_factor: by which λ is multiplied, saved with a checkpoint.
        learning_rate_factor: by which the learning rate is multiplied, saved with a checkpoint.
        last_terms: of the last training batch.
        loss_is_finite: whether the loss was, in all batches of the optimiser step.

    Raises:
        ValueError: if a number is out of range.
    """

    size_factor: Tensor | None

    def __init__(
        self,
        model: NVAE,
        *,
        kl: KL = BALANCED,
        penalty: Penalty = PENALISED,
        optimizer: Optimizer = ADAMAX,
        final_learning_rate: int | float = 1e-4,
        warmup_epochs: int | float = 5,
        num_importance_samples: int = 10,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__(model, num_importance_samples=num_importance_samples)
        for name, value, minimum in (
            ("final_learning_rate", final_learning_rate, 0),
            ("warmup_epochs", warmup_epochs, 0),
        ):
            if not minimum <= value < math.inf:
                raise ValueError(
                    f"module.{name} must be at least {minimum} and finite, got {value}"
                )
        _check_optimizer(optimizer)
        self.kl = kl
        self.penalty = penalty
        self.optimizer = optimizer
        self.final_learning_rate = final_learning_rate
        self.warmup_epochs = warmup_epochs
        self.spectral_penalty = SpectralPenalty(model) if penalty.spectral else None
        factors = None if kl.size_factor is None else kl.size_factor(model.hierarchy)
        self.register_buffer("size_factor", factors, persistent=False)
        self.total_steps = 0
        self.penalty_factor = 1.0
        self.learning_rate_factor = 1.0
        self.last_terms: ELBO | None = None
        self.loss_is_finite = torch.tensor(True)
        self.cuda_graphs = cuda_graphs
        self._graphed: graphs.GraphedLoss | None = None

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
        self.trainer.fit_loop.setup_data()  # or the number of batches may not be known yet
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        # Of data without a length an epoch has infinitely many.
        warmup_steps = round(min(self.warmup_epochs * steps_per_epoch, self.total_steps // 10))

        def factor(step: int) -> float:
            rate = warmup_cosine(
                step,
                peak=peak,
                final=self.final_learning_rate,
                warmup_steps=warmup_steps,
                total_steps=self.total_steps,
            )
            # Which may be another one after a resume with another learning rate.
            return self.learning_rate_factor * rate / optimizer.param_groups[0]["initial_lr"]

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @_restricted_classmethod
    def load_from_checkpoint(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls: type[Module],
        checkpoint_path: str | PathLike[str],
        map_location: torch.device | str | int | None = None,
        *,
        strict: bool = True,
        weights_only: bool = True,
        **given: Any,
    ) -> Module:
        """Build the module that a checkpoint was saved of, with its weights.

        Model, objective and optimiser are those of the checkpoint, which is read as data: nothing
        in it is run. Checkpoints of earlier versions do not know their objective and optimiser,
        which are then the defaults.

        Args:
            checkpoint_path: checkpoint of a training.
            map_location: device of the module; the CPU if None.
            strict: whether the weights must be exactly the module's.
            weights_only: always true: nothing else is read.
            **given: arguments of the constructor, or of :class:`NVAE`'s, to take instead of the
                checkpoint's, as those that are not of this package.

        Raises:
            ValueError: if there is no such checkpoint, or it is damaged or not of an NVAE.
        """
        if not weights_only:
            raise ValueError(
                "weights_only: got False, but checkpoints hold tensors and plain values, of which "
                "nothing else is read; leave it out"
            )
        content = read_torch_file(checkpoint_path)
        try:
            module = cls._of_content(content, strict, given)
        except ValueError as error:
            raise ValueError(f"'{checkpoint_path}': {error}") from error
        return module.to("cpu" if map_location is None else map_location)

    @classmethod
    def _of_content(
        cls: type[Module], content: object, strict: bool, given: dict[str, Any]
    ) -> Module:
        if not isinstance(content, dict) or not {ARCHITECTURE, "state_dict"} <= content.keys():
            raise ValueError("it is no checkpoint of an NVAE's training; give one that is")
        if "model" not in given:
            description, weights = content[ARCHITECTURE], content["state_dict"]
            if not isinstance(description, dict) or not isinstance(weights, dict):
                raise ValueError("it is no checkpoint of an NVAE's training; give one that is")
            own = {name: given.pop(name) for name in list(given) if name in description}
            if strict:
                given["model"] = build(NVAE, description, weights_of("model.", weights), own)
            else:
                arguments = restore(description, own)
                check_sizes(arguments, len(weights))
                given["model"] = NVAE(**arguments)
            given["model"].train()
        module = cls(**restore_training(content.get(HYPERPARAMETERS), given))
        module.on_load_checkpoint(content)
        try:
            found = module.load_state_dict(content["state_dict"], strict=False)
        except RuntimeError as error:
            reason = shorten(str(error), 300, placeholder=" ...")
            raise ValueError(f"its weights are of another model ({reason})") from error
        keys = {*found.missing_keys, *found.unexpected_keys}
        # Singular vectors follow from the weights.
        wrong = sorted(key for key in keys if not key.startswith("spectral_penalty."))
        if strict and wrong:
            raise ValueError(
                f"{len(wrong)} of its weights are missing or of no use, as {wrong[0]}: give the "
                "model that was trained, or strict=False"
            )
        return module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the model and its training are, and what a rollback has changed."""
        checkpoint[ARCHITECTURE] = self.model.architecture
        checkpoint[HYPERPARAMETERS] = describe_training(self)
        checkpoint["factors"] = {
            "penalty": self.penalty_factor,
            "learning_rate": self.learning_rate_factor,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what :meth:`on_save_checkpoint` added."""
        factors = checkpoint.get("factors", {})
        self.penalty_factor = factors.get("penalty", 1.0)
        self.learning_rate_factor = factors.get("learning_rate", 1.0)

    def setup(self, stage: str) -> None:
        """Check that there can be CUDA graphs, if they are asked for."""
        super().setup(stage)
        if stage == "fit" and self.cuda_graphs:
            check_cuda_graphs(self.trainer)

    def on_train_start(self) -> None:
        """Prepare for CUDA graphs, which are captured with the first batch."""
        if not self.cuda_graphs:
            return
        self._graphed = graphs.GraphedLoss(
            self._loss, list(self.model.parameters()), list(self.buffers())
        )
        if self.spectral_penalty is not None and not self.spectral_penalty.converged:
            with torch.no_grad():
                self.spectral_penalty()  # whose first call is not like the others

    def on_train_end(self) -> None:
        """Free what CUDA graphs keep, as the weights may be moved now."""
        self._graphed = None

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        """Loss of one batch, nats per image."""
        x = self._input(batch, "train")
        beta = self.kl.beta(self.global_step, self.total_steps)
        weight = self.penalty_factor * annealed_penalty_weight(
            beta, initial=self.penalty.initial_weight, final=self.penalty.weight
        )
        if self._graphed is None:
            found = self._loss(x, beta, weight)
        else:
            numbers = (torch.full((), value, device=x.device) for value in (beta, weight))
            found = _Loss(*self._graphed(x, *numbers))
        terms = self.last_terms = ELBO(found.distortion, found.rate)
        is_finite = torch.isfinite(found.loss.detach())
        is_first = batch_idx % self.trainer.accumulate_grad_batches == 0
        self.loss_is_finite = is_finite if is_first else self.loss_is_finite & is_finite
        if self._is_logging_step:
            balance = torch.ones(len(terms.rate))
            if self.size_factor is not None and beta < 1.0:
                balance = balancing_factors(terms.rate, self.size_factor)
            actives = [
                active_channels(mean_over_ranks(rates)).float() for rates in found.channel_rates
            ]
            means = self._means("train", terms)
            means["train/loss"] = found.loss.detach()
            # All ranks' batches are of one size.
            values = mean_over_ranks(torch.stack(list(means.values()))).unbind()
            metrics = {
                **dict(zip(means, values, strict=True)),
                **by_group("train/active_channels", torch.stack(actives)),
                **by_group("train/kl_balance", balance),
                **dict(zip(self._penalties, found.penalties, strict=True)),
                "train/beta": beta,
                "train/penalty_weight": weight,
            }
            self.log("train/bpd", metrics.pop("train/bpd"), prog_bar=True, batch_size=len(x))
            self.log_dict(metrics, batch_size=len(x))
        return found.loss

    def _loss(self, x: Images, beta: float | Tensor, weight: float | Tensor) -> _Loss:
        """Compute the loss, given β and λ; only it carries gradients."""
        inference, terms = self._infer(x)
        loss = (terms.distortion + balance_kl(terms.rate, self.size_factor, beta)).mean()
        profiler: Profiler = self.trainer.profiler  # pyright: ignore[reportAttributeAccessIssue]
        with profiler.profile("penalties"):
            penalties = [penalty() for penalty in self._penalties.values()]
        for value in penalties:
            loss = loss + weight * value
        rates = [channel_rates(latent) for latent in inference.latents]
        return _Loss(
            loss,
            terms.distortion.detach(),
            terms.rate.detach(),
            torch.stack(rates).detach(),
            torch.stack(penalties).detach() if penalties else loss.new_empty(0),
        )

    @property
    def _penalties(self) -> dict[str, Callable[[], Tensor]]:
        penalties: dict[str, Callable[[], Tensor]] = {}
        if self.spectral_penalty is not None:
            penalties["train/spectral"] = self.spectral_penalty
        if self.penalty.bn_scale:
            penalties["train/bn_scale"] = partial(bn_scale_penalty, self.model)
        return penalties

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norms of the weights and of the gradient that the optimiser is about to use."""
        if self._is_logging_step:
            weights = [p.detach() for p in self.model.parameters()]
            self.log("train/weight_norm", torch.nn.utils.get_total_norm(weights))
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            if gradients:  # the step is not skipped
                self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

    @property
    def _is_logging_step(self) -> bool:
        # Numbers cost a wait for the device, so they are made only where a logger takes them.
        return is_logging_step(self.trainer, self.global_step + 1)


def _check_optimizer(constructor: Optimizer) -> None:
    """Build it once, as the training would do too late.

    Raises:
        ValueError: if a number is out of range.
    """
    settings: dict[str, object] = getattr(constructor, "keywords", {})
    try:
        defaults = constructor([torch.nn.Parameter(torch.zeros(1))]).defaults
    except (ValueError, TypeError, RuntimeError) as error:
        given = ", ".join(f"optimizer.{name}={value}" for name, value in settings.items())
        raise ValueError(f"{given}: {error}") from error
    for name, value in defaults.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not 0.0 <= value < math.inf or (name == "lr" and value == 0.0):
                raise ValueError(
                    f"optimizer.{name} must be "
                    f"{'positive' if name == 'lr' else 'at least 0'} and finite, got {value}"
                )
