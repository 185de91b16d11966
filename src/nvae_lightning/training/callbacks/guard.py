"""Protection of a training against non-finite values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils import get_total_norm

from nvae_lightning.serialization.checkpoints import LATEST_WEIGHTS, read_checkpoint, step_of
from nvae_lightning.training.callbacks.checkpoint import Checkpoint
from nvae_lightning.training.module import NVAEModule, is_logging_step
from nvae_lightning.utilities.image import require_int


class DivergedError(RuntimeError):
    """Divergence of a training in spite of skipped steps and rollbacks."""


class Guard(Callback):
    """Skip steps with a non-finite loss or gradient; roll back after too many in a row.

    A skipped step does not change weights, optimiser and running statistics on any rank,
    whichever rank has the value. After `patience` skipped steps in a row, weights and optimiser
    roll back to the last checkpoint before them, with a higher λ and a lower learning rate;
    schedules and data continue. After `max_rollbacks` rollbacks the training ends.

    In fp16 the gradient scaler handles gradients that overflow, until its scale is 1.

    Args:
        max_grad_norm: Gradient norm above which steps are also skipped; None disables the limit.
        patience: Number of skipped steps in a row before a rollback.
        max_rollbacks: Maximum number of rollbacks.
        penalty_factor: Factor on λ at each rollback.
        learning_rate_factor: Factor on the learning rate at each rollback.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        max_grad_norm: int | float | None = None,
        patience: int = 10,
        max_rollbacks: int = 3,
        penalty_factor: int | float = 2.0,
        learning_rate_factor: int | float = 0.5,
    ) -> None:
        name = "callbacks.guard"
        require_int(f"{name}.patience", patience, 1)
        require_int(f"{name}.max_rollbacks", max_rollbacks, 0)
        is_rate = 0 < learning_rate_factor <= 1
        for setting, value, holds, rule in (
            ("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm > 0,
             "positive or null"),
            ("penalty_factor", penalty_factor, penalty_factor >= 1, "at least 1"),
            ("learning_rate_factor", learning_rate_factor, is_rate, "above 0 and at most 1"),
        ):  # fmt: skip
            if not holds:
                raise ValueError(f"{name}.{setting} must be {rule}, got {value!r}")
        self.max_grad_norm = max_grad_norm
        self.patience = patience
        self.max_rollbacks = max_rollbacks
        self.penalty_factor = penalty_factor
        self.learning_rate_factor = learning_rate_factor
        self.num_skipped = 0
        self.num_rollbacks = 0
        self._num_in_a_row = 0  # skipped since the last step that was made
        self._seen = ""
        self._statistics: list[Tensor] = []
        self._kept: list[Tensor] = []

    @property
    def is_skipping(self) -> bool:
        """Whether the last step was skipped."""
        return self._num_in_a_row > 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "num_skipped": self.num_skipped,
            "num_rollbacks": self.num_rollbacks,
            "num_in_a_row": self._num_in_a_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.num_skipped = state_dict["num_skipped"]
        self.num_rollbacks = state_dict["num_rollbacks"]
        self._num_in_a_row = state_dict.get("num_in_a_row", 0)  # missing in early checkpoints

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the running statistics, which a forward pass changes before its loss is known."""
        self._statistics = [b for n, b in pl_module.named_buffers() if ".running_" in n]
        self._kept = [b.clone() for b in self._statistics]

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take or skip this step, on all ranks alike."""
        assert isinstance(pl_module, NVAEModule)
        norm = get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        if self._is_good(trainer, pl_module, norm):
            self._num_in_a_row = 0
            _copy(self._kept, self._statistics)
        else:
            self._skip(trainer, pl_module, norm)
        if is_logging_step(trainer, trainer.global_step + 1):
            pl_module.log("train/skipped_steps", float(self.num_skipped))
            pl_module.log("train/rollbacks", float(self.num_rollbacks))

    def _is_good(self, trainer: Trainer, module: NVAEModule, norm: Tensor) -> bool:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        is_good = module.loss_is_finite
        if scaler is None or scaler.get_scale() <= 1.0:
            is_good = is_good & torch.isfinite(norm)
        if self.max_grad_norm is not None:
            is_good = is_good & ~(torch.isfinite(norm) & (norm > self.max_grad_norm))
        is_good = is_good.int()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(is_good, torch.distributed.ReduceOp.MIN)
        return bool(is_good)

    def _skip(self, trainer: Trainer, module: NVAEModule, norm: Tensor) -> None:
        self.num_skipped += 1
        self._num_in_a_row += 1
        seen = _describe_nonfinite(module)
        if not seen and self.max_grad_norm is not None and norm > self.max_grad_norm:
            seen = f"gradient norm {float(norm):.3g} above {self.max_grad_norm}"
        self._seen = seen or self._seen
        rank_zero_warn(f"step {trainer.global_step} skipped: {seen or 'seen on another rank'}")
        _copy(self._statistics, self._kept)
        for parameter in module.parameters():
            parameter.grad = None  # optimisers skip parameters without a gradient

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Roll back if too many steps in a row were skipped.

        Raises:
            DivergedError: After too many rollbacks, or without a checkpoint to roll back to.
        """
        assert isinstance(pl_module, NVAEModule)
        if self._num_in_a_row < self.patience:
            return
        if self.num_rollbacks >= self.max_rollbacks:
            raise self._diverged(trainer, f"after {self.num_rollbacks} rollbacks")
        path = trainer.strategy.broadcast(self._last_good(trainer))
        if path is None:
            raise self._diverged(trainer, "before the first checkpoint")
        checkpoint = read_checkpoint(Path(path))
        pl_module.load_state_dict(checkpoint.get(LATEST_WEIGHTS, checkpoint["state_dict"]))
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates = [group["lr"] * self.learning_rate_factor for group in groups]
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate  # the schedule's, not the checkpoint's
        pl_module.penalty_factor *= self.penalty_factor
        pl_module.learning_rate_factor *= self.learning_rate_factor
        _copy(self._kept, self._statistics)
        self.num_rollbacks += 1
        self._num_in_a_row = 0
        rank_zero_warn(
            f"step {trainer.global_step}: rolled back to '{path}' after {self.patience} skipped "
            f"steps; λ is now {pl_module.penalty_factor:g} times and the learning rate "
            f"{pl_module.learning_rate_factor:g} times its setting"
        )

    def _diverged(self, trainer: Trainer, when: str) -> DivergedError:
        """Log the divergence, which distinguishes this run from other unfinished ones."""
        for logger in trainer.loggers:
            logger.log_metrics({"train/diverged": 1.0}, step=trainer.global_step - 1)
            logger.save()
        seen = [self._seen]
        if trainer.world_size > 1:
            seen = [""] * trainer.world_size
            torch.distributed.all_gather_object(seen, self._seen)
        first = next(filter(None, seen), "a gradient that is not finite")
        return DivergedError(
            f"the training has diverged: {self.patience} steps in a row were skipped up to step "
            f"{trainer.global_step}, {when}; seen: {first}. Try a higher penalty.weight, a lower "
            "optimizer.lr, trainer.precision=bf16-mixed or 32-true, callbacks.guard.max_grad_norm"
        )

    def _last_good(self, trainer: Trainer) -> str | None:
        """Return the latest intact checkpoint that was not written while steps were skipped."""
        if not trainer.is_global_zero:
            return None
        saving = (one for one in trainer.checkpoint_callbacks if isinstance(one, Checkpoint))
        folders = [Path(str(one.dirpath)) for one in saving]
        paths = [path for folder in folders for path in folder.glob("step*.ckpt")]
        for path in sorted(paths, key=step_of, reverse=True):
            try:
                checkpoint = read_checkpoint(path)
            except ValueError as error:
                rank_zero_warn(f"{error}; another one is used")
                continue
            if not checkpoint["callbacks"].get(self.state_key, {}).get("num_in_a_row", 0):
                return str(path)
        return None


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy many small tensors with one kernel."""
    if targets:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def _describe_nonfinite(module: NVAEModule) -> str:
    """Name the places of NaN or infinite values on this rank, as near the cause as possible."""
    places = []
    terms = module.last_terms
    if terms is not None:
        groups = (~torch.isfinite(terms.rate).all(1)).nonzero().flatten().tolist()
        if groups:
            places.append(f"KL of group{'s' if len(groups) > 1 else ''} {_some(groups)}")
        if not torch.isfinite(terms.distortion).all():
            places.append("distortion")
    if not places:
        names = [
            name
            for name, parameter in module.named_parameters()
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
        ]
        places += [f"gradient of {_some(names)}"] if names else []
    return ", ".join(places)


def _some(items: list[Any]) -> str:
    return ", ".join(map(str, items[:3])) + (f" and {len(items) - 3} more" if items[3:] else "")
