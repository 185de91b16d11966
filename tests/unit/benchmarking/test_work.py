"""A Work runs steps of a real training, sampling or loading; rounds of several alternate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from nvae_lightning.benchmarking import (
    Cost,
    Loading,
    Memory,
    RandomImages,
    Repetition,
    Result,
    Roofline,
    Rounds,
    Times,
    Training,
    Work,
    alternate,
    compare_speeds,
    work,
)
from nvae_lightning.data import Image as ImageFormat
from nvae_lightning.utilities import figures

from .conftest import BATCH, Build


def test_phases_add_up_to_the_step(build_training: Callable[[], Training]) -> None:
    times = build_training().run(num_warmup_steps=1, num_steps=5)
    assert sum(times.phases.values()) == pytest.approx(times.step, rel=0.02)
    for phase in ("data", "forward", "penalties", "backward", "optimizer"):
        assert times.phases[phase] > 0.0
    assert times.phases["forward"] > times.phases["data"]


def test_rounds_continue_one_training(build_training: Callable[[], Training]) -> None:
    training = build_training()
    weight = training.module.get_parameter("model.encoder.stem.weight")
    before = weight.detach().clone()
    training.run(num_warmup_steps=2, num_steps=3)
    assert training.trainer.global_step == 5
    between = weight.detach().clone()
    assert not torch.equal(before, between)
    training.run(num_warmup_steps=1, num_steps=1)
    assert training.trainer.global_step == 7
    assert not torch.equal(between, weight)


def test_accelerator_phases_are_measured_in_separate_steps(
    build_training: Callable[[], Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    training = build_training()
    training.device = torch.device("cuda")  # for the stopwatch only; Lightning stays on the CPU
    monkeypatch.setattr(
        work, "synchronize", lambda device: waits.append(training.trainer.global_step)
    )
    times = training.run(num_warmup_steps=2, num_steps=3)
    assert training.trainer.global_step == 2 + 2 * 3
    counts = [waits.count(step) for step in range(2 + 2 * 3 + 1)]
    assert counts[:5] == [0, 1, 1, 0, 0]  # only where the clock is read
    assert min(counts[5:8]) > 8
    assert sum(times.phases.values()) > 0.0
    assert training.trainer.profiler.synchronize is None  # pyright: ignore


def test_kept_bytes_are_weights_gradients_and_moments(
    build_training: Callable[[], Training],
) -> None:
    training = build_training()
    training.run(num_warmup_steps=1, num_steps=1)
    parameters = list(training.module.parameters())
    expected = 3 * sum(p.nbytes for p in parameters) + 4 * len(parameters)  # step counters
    assert training.kept_bytes - training.weight_bytes == expected
    # Released while other settings are measured.
    assert all(p.grad is None for p in parameters)
    assert training.trainer.optimizers == []


def test_rounds_alternate() -> None:
    order: list[str] = []

    class Noted(Work):
        device = torch.device("cpu")
        weight_bytes = kept_bytes = 4000

        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, *, num_warmup_steps: int, num_steps: int) -> Times:
            order.append(f"{self.name}{num_steps}")
            torch.zeros(1000)
            return Times(0.0, 1.0, {})

    first, second = alternate(
        [Noted("a"), Noted("b")], num_rounds=2, num_warmup_steps=1, num_steps=2
    )
    assert order == ["a1", "b1", *["a2", "b2"] * 2, "a1", "b1"]  # the last two profile memory
    assert len(first.times) == len(second.times) == 2
    assert first.warmup_seconds > first.first_step_seconds == 0.0
    assert (first.memory.tensors, first.memory.kept) == (8000, 4000)
    assert first.memory.resident > 1 << 20


def test_repetition_runs_without_gradients_in_the_precision_of_the_trainer(
    build_module: Build,
) -> None:
    seen = []
    trainer = Trainer(accelerator="cpu", devices=1, precision="bf16-mixed", logger=False)
    module = build_module()

    def step() -> None:
        mean = module.model.sample(BATCH).mean
        x = torch.ones(2, 2) @ torch.ones(2, 2)
        seen.append((x.dtype, mean.requires_grad, module.training))

    work = Repetition(trainer, module, "sample", lambda: step)
    times = work.run(num_warmup_steps=2, num_steps=3)
    assert seen == [(torch.bfloat16, False, False)] * 5
    assert times.phases == {"sample": times.step}
    assert times.first_step > 0.0


def test_loading_starts_again_after_an_epoch() -> None:
    loading = Loading(DataLoader(range(4), batch_size=2))  # pyright: ignore[reportArgumentType]
    times = loading.run(num_warmup_steps=1, num_steps=9)
    assert times.phases["data"] == times.step > 0.0


def test_random_images_use_all_levels_and_depend_only_on_the_seed() -> None:
    settings = {"num_batches": 3, "batch_size": 8, "image": ImageFormat(3, 16, 5)}
    data = RandomImages(**settings)
    loader = data.train_dataloader()
    assert len(loader) == 3
    x = data.to_input(next(iter(loader)), train=True)
    assert x.shape == (8, 3, 16, 16)
    assert len(x.unique()) == 2**5
    again = RandomImages(**settings)
    assert (data.load("train").images == again.load("train").images).all()


RESULT = Result(
    label="a",
    device="CPU",
    precision="32-true",
    batch_size=10,
    rounds=Rounds(
        20.0,
        9.0,
        [
            Times(9.0, step, {"forward": step / 4, "backward": step * 3 / 4})
            for step in (1.0, 2.0, 4.0)
        ],
        Memory(tensors=3000, kept=1000, resident=9000),
    ),
    cost=Cost(flops=40, bytes=10),
    roofline=Roofline(flops_per_second=100.0, bytes_per_second=100.0),
    largest_batch=None,
)


def test_results_are_medians_per_image() -> None:
    assert RESULT.rates == [10.0, 5.0, 2.5]
    assert RESULT.images_per_second == 5.0
    assert RESULT.ms_per_image == 200.0
    assert RESULT.phases == {"forward": 50.0, "backward": 150.0}
    assert RESULT.bytes_per_image == 200.0
    assert RESULT.least_ms_per_image == pytest.approx(1e3 * 0.4 / 10)
    assert RESULT.fraction == pytest.approx(0.2)
    plain = RESULT.as_dict()
    assert plain["phases"]["backward"] == {"ms_per_image": 150.0, "share": 0.75}
    assert plain["roofline"]["gflop_per_image"] == 4e-9


def test_figure_shows_phases_and_roofline() -> None:
    phases = [RESULT.phases, {"forward": 20.0, "backward": 60.0}]
    (axes,) = figures.phases_beside_roofline(["a", "b"], phases, [40.0, 4.0]).axes
    ends = [(bar.get_x(), bar.get_width()) for bars in axes.containers for bar in bars]  # pyright: ignore
    assert ends == [(0.0, 50.0), (0.0, 20.0), (50.0, 150.0), (20.0, 60.0)]
    assert [line.get_xdata()[0] for line in axes.lines] == [40.0, 4.0]  # pyright: ignore


def test_speeds_are_compared_round_by_round() -> None:
    steps = (0.5, 2.0, 2.0)
    rounds = dataclasses.replace(RESULT.rounds, times=[Times(9.0, step, {}) for step in steps])
    ratio = compare_speeds(RESULT, dataclasses.replace(RESULT, rounds=rounds))
    assert ratio == {"median": 2.0, "min": 1.0, "max": 2.0, "of_rounds": [2.0, 1.0, 2.0]}
