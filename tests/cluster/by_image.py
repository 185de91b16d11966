"""Callback of the trainings under test: randomness that does not depend on the number of ranks."""

from __future__ import annotations

import io
import os
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nvae_lightning.training.callbacks import Preemption

_TIMEOUT = 900.0  # seconds


class ByImage(Callback):
    """Draw each image's noise from the image and the step; interrupt the training on request.

    Args:
        hold_before: Step before which every rank writes `reached.RANK` in `folder` and waits for
            `go`, or for a signal; None for never.
        kill_in: Step at whose end rank 1 kills itself, once; None for never.
        seconds_per_write: Pause in the middle of every checkpoint's file.
        folder: Folder of these files.
    """

    def __init__(
        self,
        hold_before: int | None = None,
        kill_in: int | None = None,
        seconds_per_write: int | float = 0,
        folder: str = ".",
    ) -> None:
        self.hold_before, self.kill_in = hold_before, kill_in
        self.seconds_per_write = seconds_per_write
        self.folder = Path(folder)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module: Any = pl_module
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        data.to_input = lambda batch, train: (batch > 127).to(module.dtype)

        def noise(image: Tensor) -> list[Tensor]:
            seed = zlib.crc32(image.contiguous().numpy().tobytes())
            generator = torch.Generator().manual_seed(1000 * seed + trainer.global_step)
            shapes = module.model.latent_shapes
            return [torch.randn(s, generator=generator, dtype=module.dtype) for s in shapes]

        def infer(x: Tensor) -> Any:
            groups = zip(*map(noise, x), strict=True)
            return module.model(x, [torch.stack(group) for group in groups])

        module._infer = infer
        if stage == "fit" and self.seconds_per_write:
            self._write_slowly()

    def _write_slowly(self) -> None:
        save: Any = torch.save

        def save_slowly(values: Any, file: Any) -> None:
            buffer = io.BytesIO()
            save(values, buffer)
            middle = buffer.tell() // 2
            file.write(buffer.getvalue()[:middle])
            file.flush()
            time.sleep(self.seconds_per_write)
            file.write(buffer.getvalue()[middle:])

        torch.save = save_slowly

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step + 1 != self.hold_before:
            return
        (self.folder / f"reached.{trainer.global_rank}").touch()
        (preemption,) = [c for c in trainer.callbacks if isinstance(c, Preemption)]  # pyright: ignore
        deadline = time.monotonic() + _TIMEOUT
        while not (self.folder / "go").exists() and not preemption._received:
            assert time.monotonic() < deadline, "nobody let the training continue"
            time.sleep(0.1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        killed = self.folder / "killed"
        is_here = trainer.global_step == self.kill_in and trainer.global_rank == 1
        if is_here and not killed.exists():  # while rank 0 is about to write a checkpoint
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
