"""Training of an NVAE with Lightning."""

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
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.profiler import record_function

from nvae_lightning.backends import cuda_graphs as graphs
from nvae_lightning.inference.batches import Images
from nvae_lightning.inference.evaluation import EvaluationModule
from nvae_lightning.inference.metrics import Statistics, by_group, metrics
from nvae_lightning.model import NVAE
from nvae_lightning.model.normalization import mean_over_ranks
from nvae_lightning.objective import (
    ELBO,
    KL,
    Penalty,
    SpectralPenalty,
    annealed_penalty_weight,
    balance_kl,
    balancing_factors,
    bn_scale_penalty,
    elbo,
    warmup_cosine,
)
from nvae_lightning.serialization.architecture import ARCHITECTURE, restore
from nvae_lightning.serialization.checkpoints import read_torch_file
from nvae_lightning.serialization.weights import build, check_sizes, weights_of
from nvae_lightning.training.hyperparameters import (
    HYPERPARAMETERS,
    check_optimizer,
    describe_training,
    restore_training,
)

Module = TypeVar("Module", bound="NVAEModule")
Optimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]

#: The paper's settings that most of its datasets share.
BALANCED = KL()
PENALISED = Penalty()
ADAMAX = partial(torch.optim.Adamax, lr=1e-2, eps=1e-3, weight_decay=3e-4, foreach=True)


class Loss(NamedTuple):
    """Loss of a batch and its terms; gradients flow through ``loss`` only."""

    loss: Float[Tensor, ""]
    distortion: Float[Tensor, " batch"]
    rate: Float[Tensor, "group batch"]
    channel_rates: Float[Tensor, "group channel"]
    penalties: Float[Tensor, " penalty"]


def is_logging_step(trainer: Trainer, step: int) -> bool:
    """Return whether loggers record an optimiser step, counted from 1."""
    interval: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
    return interval > 0 and step > 0 and step % interval == 0


def check_cuda_graphs(trainer: Trainer) -> None:
    """Check that a trainer's steps can be captured as CUDA graphs.

    Raises:
        ValueError: If the trainer has no CUDA device or several, or accumulates gradients.
    """
    graphs.check_device(trainer.strategy.root_device)
    for name, number in (
        ("devices", trainer.world_size),
        ("accumulate_grad_batches", trainer.accumulate_grad_batches),
    ):
        if number > 1:
            raise ValueError(
                f"cuda_graphs: got true with trainer.{name}={number}, but a graph captures a step "
                f"of one device and one batch; set trainer.{name}=1, or leave cuda_graphs out"
            )


class NVAEModule(EvaluationModule):
    r"""NVAE with its objective and optimiser.

    .. math::
        loss = E\left[-\log p(x|z) + \beta \sum_l \gamma_l KL_l\right]
               + \lambda \left(\sum_i s_i + \sum_j \max|\gamma_j|\right)

    Source: Vahdat & Kautz 2020, Sec. 3.2 and A, whose settings are the defaults.

    Batches are images in [0, 1], alone or before their labels in a tuple or list. Random numbers
    follow from the seed of ``seed_everything``; see :class:`SeededModule`.

    Args:
        model: Model to train.
        kl: KL term of the loss.
        penalty: Penalties on the weights.
        optimizer: Constructor of the optimiser, called with the parameters.
        final_learning_rate: Learning rate at the end of the training.
        warmup_epochs: Number of epochs of linear warm-up; at most a tenth of all steps.
        num_importance_samples: Samples per image of the log-likelihood in tests and predictions.
        cuda_graphs: Whether to launch the loss and its gradients as CUDA graphs, at less cost to
            the host; requires one CUDA device and no accumulation of gradients.

    Attributes:
        penalty_factor: Factor on λ after rollbacks, saved with a checkpoint.
        learning_rate_factor: Factor on the learning rate after rollbacks, saved with a checkpoint.
        last_terms: Terms of the last training batch.
        loss_is_finite: Whether the losses of all batches of the optimiser step are finite.

    Raises:
        ValueError: If a number is out of range.
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
        for name, value in (
            ("final_learning_rate", final_learning_rate),
            ("warmup_epochs", warmup_epochs),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"module.{name} must be at least 0 and finite, got {value}")
        check_optimizer(optimizer)
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

    def loss(
        self, x: Images, beta: float | Tensor = 1.0, penalty_weight: float | Tensor = 0.0
    ) -> Loss:
        """Compute the loss of a batch, in nats per image; requires no trainer.

        Args:
            x: Images in [0, 1].
            beta: Weight β of the KL term; below 1 the groups are balanced.
            penalty_weight: Weight λ of the penalties.
        """
        inference = self._infer(x)
        terms = elbo(inference, x)
        loss = (terms.distortion + balance_kl(terms.rate, self.size_factor, beta)).mean()
        penalties = self.penalties()
        for value in penalties.values():
            loss = loss + penalty_weight * value
        values = [value.detach() for value in penalties.values()]
        return Loss(
            loss,
            terms.distortion.detach(),
            terms.rate.detach(),
            Statistics.of(inference, terms).channel_rates,
            torch.stack(values) if values else loss.new_empty(0),
        )

    def penalties(self) -> dict[str, Tensor]:
        """Compute the penalties on the weights, without their weight λ."""
        values = {}
        with record_function("penalties"):
            if self.spectral_penalty is not None:
                values["spectral"] = self.spectral_penalty()
            if self.penalty.bn_scale:
                values["bn_scale"] = bn_scale_penalty(self.model)
        return values

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        """Return the loss of a batch, in nats per image."""
        x = self._input(batch, "train")
        beta = self.kl.beta(self.global_step, self.total_steps)
        weight = self.penalty_factor * annealed_penalty_weight(
            beta, initial=self.penalty.initial_weight, final=self.penalty.weight
        )
        if self._graphed is None:
            found = self.loss(x, beta, weight)
        else:
            numbers = (torch.full((), value, device=x.device) for value in (beta, weight))
            found = Loss(*self._graphed(x, *numbers))
        self.last_terms = ELBO(found.distortion, found.rate)
        is_finite = torch.isfinite(found.loss.detach())
        is_first = batch_idx % self.trainer.accumulate_grad_batches == 0
        self.loss_is_finite = is_finite if is_first else self.loss_is_finite & is_finite
        if self._is_logging_step:
            self._log_step(found, beta, weight)
        return found.loss

    def _log_step(self, found: Loss, beta: float, weight: float) -> None:
        batch = Statistics(found.distortion.mean(), found.rate.mean(1), found.channel_rates)
        # All ranks have batches of the same size.
        means = Statistics(*map(mean_over_ranks, batch))
        balance = torch.ones(len(found.rate))
        if self.size_factor is not None and beta < 1.0:
            balance = balancing_factors(found.rate, self.size_factor)
        names = [name for name in ("spectral", "bn_scale") if getattr(self.penalty, name)]
        logged = {
            "loss": mean_over_ranks(found.loss.detach()),
            **metrics(means, self.model.image.num_dims),
            **by_group("kl_balance", balance),
            **dict(zip(names, found.penalties, strict=True)),
            "beta": beta,
            "penalty_weight": weight,
        }
        size = len(found.distortion)
        for name, value in logged.items():
            self.log(f"train/{name}", value, prog_bar=name == "bpd", batch_size=size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norms of the weights and of the gradient."""
        if self._is_logging_step:
            weights = [p.detach() for p in self.model.parameters()]
            self.log("train/weight_norm", get_total_norm(weights))
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            if gradients:  # otherwise the step is skipped
                self.log("train/grad_norm", get_total_norm(gradients))

    @property
    def _is_logging_step(self) -> bool:
        # Reading values synchronises with the device, so only logged ones are read.
        return is_logging_step(self.trainer, self.global_step + 1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimiser and its learning-rate schedule, which covers the whole training.

        Raises:
            ValueError: If the training has no end.
        """
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise ValueError(
                "trainer.max_steps and trainer.max_epochs: got no limit, but schedules require an "
                "end of the training; set one of them"
            )
        self.total_steps = int(total_steps)
        optimizer = self.optimizer(self.model.parameters())
        peak = optimizer.param_groups[0]["lr"]
        self.trainer.fit_loop.setup_data()  # or the number of batches may not be known yet
        # Infinite for data without a length.
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warmup_steps = round(min(self.warmup_epochs * steps_per_epoch, self.total_steps // 10))

        def factor(step: int) -> float:
            rate = warmup_cosine(
                step,
                peak=peak,
                final=self.final_learning_rate,
                warmup_steps=warmup_steps,
                total_steps=self.total_steps,
            )
            # A resume restores the checkpoint's initial rate, which may differ from the peak.
            return self.learning_rate_factor * rate / optimizer.param_groups[0]["initial_lr"]

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def setup(self, stage: str) -> None:
        """Check that CUDA graphs, if requested, are possible."""
        super().setup(stage)
        if stage == "fit" and self.cuda_graphs:
            check_cuda_graphs(self.trainer)

    def on_train_start(self) -> None:
        """Prepare the CUDA graphs, which are captured with the first batch."""
        if not self.cuda_graphs:
            return
        self._graphed = graphs.GraphedLoss(
            self.loss, list(self.model.parameters()), list(self.buffers())
        )
        if self.spectral_penalty is not None and not self.spectral_penalty.converged:
            with torch.no_grad():
                self.spectral_penalty()  # its first call differs from later ones

    def on_train_end(self) -> None:
        """Release the CUDA graphs: the weights may move to another device now."""
        self._graphed = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the architecture, the hyperparameters, the seed and the factors of rollbacks."""
        checkpoint[ARCHITECTURE] = self.model.architecture
        checkpoint[HYPERPARAMETERS] = describe_training(self)
        checkpoint["seed"] = self._seed
        checkpoint["factors"] = {
            "penalty": self.penalty_factor,
            "learning_rate": self.learning_rate_factor,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the seed and the factors of rollbacks."""
        self._seed = checkpoint.get("seed", self._seed)
        factors = checkpoint.get("factors", {})
        self.penalty_factor = factors.get("penalty", 1.0)
        self.learning_rate_factor = factors.get("learning_rate", 1.0)

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
        """Rebuild the module of a checkpoint, with its weights.

        The checkpoint describes model, objective and optimiser as data; no code in it is run.
        Early checkpoints lack the objective and optimiser, for which defaults are used.

        Args:
            checkpoint_path: Checkpoint of a training.
            map_location: Device of the module; the CPU if None.
            strict: Whether the weights must match the module exactly.
            weights_only: Always true: code is never read from a checkpoint.
            **given: Arguments of the constructor or of :class:`NVAE` that replace the
                checkpoint's, such as constructors from outside this package.

        Raises:
            ValueError: If the checkpoint is missing, damaged, or not of an NVAE.
        """
        if not weights_only:
            raise ValueError(
                "weights_only: got False, but checkpoints are read as tensors and plain values "
                "only; leave it out"
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
        foreign = "it is not the checkpoint of an NVAE's training; give one that is"
        if not isinstance(content, dict) or not {ARCHITECTURE, "state_dict"} <= content.keys():
            raise ValueError(foreign)
        if "model" not in given:
            description, weights = content[ARCHITECTURE], content["state_dict"]
            if not isinstance(description, dict) or not isinstance(weights, dict):
                raise ValueError(foreign)
            own = {name: given.pop(name) for name in list(given) if name in description}
            if strict:
                given["model"] = build(NVAE, description, weights_of("model.", weights), own)
            else:
                arguments = restore(description, own)
                check_sizes(arguments, len(weights))
                given["model"] = NVAE(**arguments)
            given["model"].train()
        module = cls(**restore_training(content.get(HYPERPARAMETERS, {}), given))
        module.on_load_checkpoint(content)
        try:
            found = module.load_state_dict(content["state_dict"], strict=False)
        except RuntimeError as error:
            reason = shorten(str(error), 300, placeholder=" ...")
            raise ValueError(f"its weights belong to another model ({reason})") from error
        keys = {*found.missing_keys, *found.unexpected_keys}
        # Singular vectors are recomputed from the weights.
        wrong = sorted(key for key in keys if not key.startswith("spectral_penalty."))
        if strict and wrong:
            raise ValueError(
                f"{len(wrong)} of its weights are missing or unexpected, for example {wrong[0]}; "
                "give the trained model, or strict=False"
            )
        return module
