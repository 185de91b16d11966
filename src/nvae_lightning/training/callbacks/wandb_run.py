"""Start and end of W&B runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def start_wandb(loggers: Sequence[Logger]) -> None:
    """Start the W&B runs before the training, without asking for a key.

    Raises:
        ValueError: If a run does not start, without a key or because of an invalid setting.
    """
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb

        terminal = sys.stdin
        try:
            # W&B's service exits on some invalid variables and ignores others.
            wandb.Settings().update_from_env_vars(dict(os.environ))
            with open(os.devnull, encoding="utf-8") as sys.stdin:
                _ = logger.experiment
        except (wandb.Error, ValueError) as error:
            raise ValueError(
                f"logger: W&B did not start a run ({_reason(error)}); run `wandb login` or "
                "correct the environment's WANDB_ variables, or train with logger=default "
                "(offline) or logger=csv"
            ) from error
        finally:
            sys.stdin = terminal


def _reason(error: Any) -> str:  # noqa: ANN401 -- Pydantic's errors have attributes
    """Return W&B's message; for an invalid setting its name, value and rule."""
    if not hasattr(error, "errors"):
        return " ".join(str(error).split()).rstrip(".")
    wrong = error.errors()[0]  # Pydantic's
    name = "_".join(map(str, wrong["loc"])).upper()
    return f"WANDB_{name}: got {wrong['input']!r}; {wrong['msg']}"


@rank_zero_only
def _finish() -> None:
    import wandb

    if wandb.run is not None:
        wandb.finish()


class FinishWandb(Callback):
    """End the W&B run with its job, or the next job of the process would continue it."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finish after the test that follows a training."""
        if stage == "test":
            _finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Finish a run that failed."""
        _finish()
