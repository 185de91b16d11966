"""Works to measure in alternating rounds: training, sampling, evaluation, data loading."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.profiler import profile
from torch.utils.data import DataLoader
from tqdm import tqdm

from nvae_lightning.benchmarking.memory_use import (
    Memory,
    allocated_bytes,
    peaks,
    release_memory,
    reset_peaks,
)
from nvae_lightning.benchmarking.profiler import PhaseProfiler
from nvae_lightning.utilities.live_bytes import kept_bytes


@dataclass(frozen=True)
class Times:
    """Times of one round, in seconds.

    Args:
        first_step: Duration of the first step, which compiles and tunes.
        step: Mean duration of a measured step.
        phases: Mean duration of each phase of a measured step.
    """

    first_step: float
    step: float
    phases: Mapping[str, float]


class Work(ABC):
    """Steps that can be repeated in rounds.

    Attributes:
        device: Device of the steps.
        weight_bytes: Bytes of weights and buffers.
        kept_bytes: Bytes of all tensors that outlived a step of the last round.
    """

    device: torch.device
    weight_bytes: int
    kept_bytes: int

    @abstractmethod
    def run(self, *, num_warmup_steps: int, num_steps: int) -> Times:
        """Run one round.

        Args:
            num_warmup_steps: Number of unmeasured steps before the others, at least one.
            num_steps: Number of measured steps.
        """

    def trace(self) -> profile:
        """Profile two steps."""
        with profile(profile_memory=True, acc_events=True) as profiled:
            self.run(num_warmup_steps=1, num_steps=1)
        return profiled


def synchronize(device: torch.device) -> None:
    """Wait for the device's pending computations."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Training(Work):
    """Training steps as Lightning runs them.

    A round is one epoch of a training that continues in the next round: the optimiser starts
    fresh, the weights and everything compiled stay. On an accelerator the phases are measured in
    further steps after those measured as a whole, because separating them requires waiting.

    Args:
        trainer: Trainer with at least as many epochs as there are rounds.
        module: Module to train.
        datamodule: Images, at least a round of them per epoch.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, datamodule: LightningDataModule
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.datamodule = datamodule
        self.device = trainer.strategy.root_device
        self.weight_bytes = self.kept_bytes = kept_bytes(module)
        self._stopwatch = _Stopwatch()
        trainer.callbacks.append(self._stopwatch)  # pyright: ignore[reportAttributeAccessIssue]
        trainer.profiler = self._stopwatch.profiler  # pyright: ignore[reportAttributeAccessIssue]
        self._stopwatch.profiler.watch(module, "penalties")

    def run(self, *, num_warmup_steps: int, num_steps: int) -> Times:
        """Run one round: see `Work`."""
        passes = 1 if self.device.type == "cpu" else 2
        self._stopwatch.set(num_warmup_steps, num_steps, passes)
        self.trainer.limit_train_batches = num_warmup_steps + passes * num_steps
        self.trainer.fit(self.module, self.datamodule)
        self.kept_bytes = self._stopwatch.kept_bytes
        # Only the weights may stay in memory while another setting is measured.
        self.module.zero_grad(set_to_none=True)
        self.trainer.strategy.optimizers = []
        self.trainer.strategy.lr_scheduler_configs = []  # which refer to the optimiser
        return self._stopwatch.times()


class _Stopwatch(Callback):
    """Measure an epoch, and stop the training after it."""

    def __init__(self) -> None:
        self.profiler = PhaseProfiler()
        self.kept_bytes = 0

    def set(self, num_warmup_steps: int, num_steps: int, passes: int) -> None:
        """Set the steps of the epoch."""
        self._num_steps = num_steps
        self._begin = num_warmup_steps
        self._end = num_warmup_steps + num_steps
        self._last = num_warmup_steps + passes * num_steps
        self._at: dict[int, float] = {}
        self._phases: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._at[0] = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Read the clock at the end of a part of the epoch."""
        done = batch_idx + 1
        if done not in (1, self._begin, self._end, self._last):
            return
        synchronize(pl_module.device)
        self._at[done] = time.perf_counter()
        if done == self._last:
            self._phases = self.profiler.seconds()
            self.profiler.synchronize = None
            gradients = [p.grad.nbytes for p in pl_module.parameters() if p.grad is not None]
            self.kept_bytes = kept_bytes(pl_module, trainer.optimizers) + sum(gradients)
        elif done == self._last - self._num_steps:
            if self._last > self._end:  # a second pass, for the phases only
                self.profiler.synchronize = lambda: synchronize(pl_module.device)
            self.profiler.restart()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the training."""
        trainer.should_stop = True

    def times(self) -> Times:
        """Return the times of the epoch."""
        return Times(
            self._at[1] - self._at[0],
            (self._at[self._end] - self._at[self._begin]) / self._num_steps,
            {phase: seconds / self._num_steps for phase, seconds in self._phases.items()},
        )


class Repetition(Work):
    """A computation with a model, repeated in the precision of a training.

    Args:
        trainer: Trainer with the device and precision to use.
        module: Module of the model.
        phase: Name of the computation.
        build_step: Function that builds the computation at the start of each round, after the
            model has moved to the device; it moves back after the round.
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
        self.weight_bytes = self.kept_bytes = kept_bytes(module)
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
    """Loading of batches.

    Args:
        loader: Loader of the batches, epoch after epoch.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.device = torch.device("cpu")
        self.weight_bytes = self.kept_bytes = 0
        self._batches = chain.from_iterable(repeat(loader))

    def run(self, *, num_warmup_steps: int, num_steps: int) -> Times:
        """Run one round: see `Work`."""
        return _repeat(
            lambda: next(self._batches), "data", self.device, num_warmup_steps, num_steps
        )


def _repeat(
    step: Callable[[], object], phase: str, device: torch.device, num_warmup_steps: int,
    num_steps: int,
) -> Times:  # fmt: skip
    seconds = []
    for count in (1, num_warmup_steps - 1, num_steps):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            step()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return Times(seconds[0], seconds[2] / num_steps, {phase: seconds[2] / num_steps})


@dataclass(frozen=True)
class Rounds:
    """Measurements of one work.

    Args:
        warmup_seconds: Duration of a short round before the others, which compiles and tunes.
        first_step_seconds: Duration of the first step, which does most of that work.
        times: Times of each round.
        memory: Peak over all rounds.
    """

    warmup_seconds: float
    first_step_seconds: float
    times: Sequence[Times]
    memory: Memory


def alternate(
    works: Sequence[Work], *, num_rounds: int, num_warmup_steps: int, num_steps: int
) -> list[Rounds]:
    """Run rounds of several works in turn, so that machine drift affects all alike.

    Args:
        works: Works to measure; all stay in memory.
        num_rounds: Number of rounds of each work.
        num_warmup_steps: Number of unmeasured steps at the start of each round.
        num_steps: Number of measured steps per round.
    """
    warmups: list[tuple[float, float]] = []
    for work in works:
        started = time.perf_counter()
        first_step = work.run(num_warmup_steps=num_warmup_steps, num_steps=1).first_step
        warmups.append((time.perf_counter() - started, first_step))
    times: list[list[Times]] = [[] for _ in works]
    memories: list[list[Memory]] = [[] for _ in works]
    with tqdm(total=num_rounds * len(works), desc="Rounds", leave=False, disable=None) as bar:
        for index in list(range(len(works))) * num_rounds:
            release_memory()
            reset_peaks(works[index].device)
            times[index].append(
                works[index].run(num_warmup_steps=num_warmup_steps, num_steps=num_steps)
            )
            memories[index].append(peaks(works[index].device, works[index].kept_bytes))
            bar.update()
    return [
        Rounds(*seconds, own_times, _peak(work, own_memories))
        for work, seconds, own_times, own_memories in zip(
            works, warmups, times, memories, strict=True
        )
    ]


def _peak(work: Work, memories: Sequence[Memory]) -> Memory:
    tensors = max(memory.tensors for memory in memories)
    if work.device.type == "cpu":  # counting slows steps down, so it comes after the rounds
        tensors = work.weight_bytes + allocated_bytes(work.trace())
    return Memory(tensors, memories[-1].kept, max(memory.resident for memory in memories))
