"""Time is split into phases without gaps or overlaps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nvae_lightning.benchmarking import profiler
from nvae_lightning.benchmarking.profiler import PhaseProfiler


class Clock:
    """Clock set by the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter  # read by older versions of Lightning


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(profiler, "time", clock)
    monkeypatch.setattr("lightning.pytorch.profilers.simple.time", clock)
    return clock


def make_step(profiled: PhaseProfiler, passes: Callable[[float], None]) -> None:
    """Run a training step with the names and order of Lightning's actions."""
    passes(1)
    with profiled.profile("[_TrainingEpochLoop].train_dataloader_next"):
        passes(2)
    with profiled.profile("[Strategy]SingleDeviceStrategy.batch_to_device"):
        with profiled.profile("[LightningDataModule]MNIST5k.on_after_batch_transfer"):
            passes(4)
    with profiled.profile("run_training_batch"):
        with profiled.profile("[LightningModule]NVAEModule.optimizer_step"):
            passes(8)
            with profiled.profile("[Strategy]SingleDeviceStrategy.training_step"):
                passes(16)
                with profiled.profile("penalties"):
                    passes(32)
                passes(64)
            with profiled.profile("[LightningModule]NVAEModule.optimizer_zero_grad"):
                passes(128)
            with profiled.profile("[Strategy]SingleDeviceStrategy.backward"):
                passes(256)
                with profiled.profile("[LightningModule]NVAEModule.on_after_backward"):
                    passes(512)
            with profiled.profile("[Callback]Guard.on_before_optimizer_step"):
                passes(1024)
        passes(2048)


def test_each_second_belongs_to_one_phase(clock: Clock) -> None:
    def passes(seconds: float) -> None:
        clock.now += seconds

    profiled = PhaseProfiler()
    passes(10000)
    profiled.restart()
    for count in (1, 2):
        make_step(profiled, passes)
        seconds = profiled.seconds()
        assert seconds == {
            "data": count * (2 + 4),
            "forward": count * (16 + 64),
            "penalties": count * 32,
            "backward": count * (256 + 512),
            "optimizer": count * (8 + 128 + 1024),
            "other": count * (1 + 2048),
        }
        assert list(seconds)[-2:] == ["optimizer", "other"]
        assert sum(seconds.values()) == count * 4095
    profiled.restart()
    assert set(profiled.seconds().values()) == {0.0}


def test_profiler_waits_for_the_device_on_request(clock: Clock) -> None:
    """An accelerator computes asynchronously: its time passes in `synchronize`."""
    started = 0.0

    def starts(seconds: float) -> None:
        nonlocal started
        started += seconds

    def wait() -> None:
        nonlocal started
        clock.now += started
        started = 0.0

    profiled = PhaseProfiler()
    make_step(profiled, starts)
    assert sum(profiled.seconds().values()) == 0.0  # no wait
    wait()
    profiled.synchronize = wait
    profiled.restart()
    make_step(profiled, starts)
    seconds = profiled.seconds()
    assert seconds["backward"] == 256 + 512
    assert seconds["penalties"] == 32
    assert sum(seconds.values()) == 4095
