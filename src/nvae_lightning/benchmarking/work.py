"""What is measured: training steps, batches of samples or likelihoods, reading of images."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from nvae_lightning.benchmarking.profiler import PhaseProfiler


@dataclass(frozen=True)
class Times:
    """Seconds of one round.

    Args:
        first_step: of the first step, in which what is compiled or tuned once is.
        step: of one step, the mean over those that are measured.
        phases: of one step, by phase.
    """

    first_step: float
    step: float
    phases: Mapping[str, float]


class Work(ABC):
    """Steps that can be repeated in rounds.

    Attributes:
        device: that they are made on.
        weight_bytes: of weights and buffers.
        kept_bytes: of all that is kept from step to step, in the last round.
    """

    device: torch.device
    weight_bytes: int
    kept_bytes: int

    @abstractmethod
    def run(self, *, num_warmup_steps: int, num_steps: int) -> Times:
        """Run one round.

        Args:
            num_warmup_steps: that are made first, at least one.
            num_steps: that are measured.
        """


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Training(Work):
    """Training steps as Lightning makes them.

    A round is one epoch of a training that goes on in the next round: the optimiser begins anew,
    the weights and all that has been compiled stay. Where it takes waiting for an accelerator to
    tell the phases apart, their steps come after those that are measured as a whole.

    Args:
        trainer: of as many epochs as there may be rounds.
        module: what is trained.
        datamodule: images, at least those of a round in an epoch.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, datamodule: LightningDataModule
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.datamodule = datamodule
        self.device = trainer.strategy.root_device
        self.weight_bytes = self.kept_bytes = _kept_bytes(module, [])
        self._stopwatch = _Stopwatch()
        trainer.callbacks.append(self._stopwatch)  # pyright: ignore[reportAttributeAccessIssue]
        trainer.profiler = self._stopwatch.profiler  # pyright: ignore[reportAttributeAccessIssue]

    def run(self, *, num_warmup_steps: int, num_steps: int) -> Times:
        """Run one round: see `Work`."""
        passes = 1 if self.device.type == "cpu" else 2
        self._stopwatch.set(num_warmup_steps, num_steps, passes)
        self.trainer.limit_train_batches = num_warmup_steps + passes * num_steps
        self.trainer.fit(self.module, self.datamodule)
        self.kept_bytes = self._stopwatch.kept_bytes
        # Nothing of this setting but the weights is to be there while another one is measured.
        self.module.zero_grad(set_to_none=True)
        self.trainer.strategy.optimizers = []
        self.trainer.strategy.lr_scheduler_configs = []  # which know the optimiser
        return self._stopwatch.times()


class _Stopwatch(Callback):
    """Take the times of an epoch, and end with it."""

    def __init__(self) -> None:
        self.profiler = PhaseProfiler()
        self.kept_bytes = 0

    def set(self, num_warmup_steps: int, num_steps: int, passes: int) -> None:
        """Say what the epoch is made of."""
        self._num_steps = num_steps
        self._begin = num_warmup_steps
        self._end = num_warmup_steps + num_steps
        self._last = num_warmup_steps + passes * num_steps
        self._at: dict[int, float] = {}
        self._phases: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._at[0] = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Read the clock where something ends."""
        done = batch_idx + 1
        if done not in (1, self._begin, self._end, self._last):
            return
        synchronize(pl_module.device)
        self._at[done] = time.perf_counter()
        if done == self._last:
            self._phases = self.profiler.seconds()
            self.profiler.synchronize = None
            self.kept_bytes = _kept_bytes(pl_module, trainer.optimizers)
        elif done == self._last - self._num_steps:
            if self._last > self._end:  # these steps are for the phases only
                self.profiler.synchronize = lambda: synchronize(pl_module.device)
            self.profiler.restart()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        trainer.should_stop = True

    def times(self) -> Times:
        """Give the times of the epoch."""
        return Times(
            self._at[1] - self._at[0],
            (self._at[self._end] - self._at[self._begin]) / self._num_steps,
            {phase: seconds / self._num_steps for phase, seconds in self._phases.items()},
        )


def _kept_bytes(module: LightningModule, optimizers: list[torch.optim.Optimizer]) -> int:
    parameters = list(module.parameters())
    gradients = [parameter.grad for parameter in parameters]
    states = tree_leaves([dict(optimizer.state) for optimizer in optimizers])
    kept = chain(parameters, gradients, module.buffers(), states)
    return sum(value.nbytes for value in kept if isinstance(value, Tensor))


class Repetition(Work):
    """One computation of a model again and again, in the precision of a training.

    Args:
        trainer: whose device and precision are meant.
        module: what is in the model's place in a training.
        phase: name of the computation.
        build_step: returns the computation, which is one round's: the model has come to the
            device, and leaves it afterwards.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        phase: str,
        build_step: Callable[[], Callable[[], object]],
    ) -> None:
        self.trainer = trainer
        self.module = trainer.precision_plugin.convert_module(module)
        self.device = trainer.strategy.root_device
        self.weight_bytes = self.kept_bytes = _kept_bytes(module, [])
        self._phase = phase
        self._build_step = build_step

    def run(self, *, num_warmup_steps: int, num_steps: int) -> Times:
        """Run one round: see `Work`."""
        self.module.to(self.device).eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            step = self._build_step()
            times = _repeat(step, self._phase, self.device, num_warmup_steps, num_steps)
        self.module.cpu()
        return times


class Loading(Work):
    """Reading of batches.

    Args:
        loader: epochs of batches.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.device = torch.device("cpu")
        self.weight_bytes = self.kept_bytes = 0
        self._batches = _endless(loader)

    def run(self, *, num_warmup_steps: int, num_steps: int) -> Times:
        """Run one round: see `Work`."""
        return _repeat(
            lambda: next(self._batches), "data", self.device, num_warmup_steps, num_steps
        )


def _endless(loader: DataLoader) -> Iterator[Tensor]:
    while True:
        yield from loader


def _repeat(
    step: Callable[[], object], phase: str, device: torch.device, num_warmup_steps: int,
    num_steps: int,
) -> Times:  # fmt: skip
    at = []
    for count in (1, num_warmup_steps - 1, num_steps):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            step()
        synchronize(device)
        at.append(time.perf_counter() - started)
    return Times(at[0], at[2] / num_steps, {phase: at[2] / num_steps})
