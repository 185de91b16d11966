"""Peak memory of programs with a known number of bytes, and of a training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import profile

from nvae_lightning.benchmarking import Training, largest_batch, memory_use
from nvae_lightning.benchmarking.memory_use import (
    allocated_bytes,
    peaks,
    release_memory,
    reset_peaks,
)
from nvae_lightning.utilities.live_bytes import LiveBytes, peak_bytes

SIZE = 1 << 20


def peak_of(function: Callable[[], object]) -> int:
    with profile(profile_memory=True, acc_events=True) as profiled:
        function()
    return allocated_bytes(profiled)


def test_allocations_count_forward_and_backward() -> None:
    weight = torch.zeros(SIZE, requires_grad=True)
    assert peak_of(lambda: [torch.zeros(SIZE), torch.zeros(SIZE)]) == 2 * 4 * SIZE
    assert peak_of(lambda: weight.exp().exp().exp().sum()) == 3 * 4 * SIZE + 4
    # Three kept maps, and the gradients of the third and the second.
    expected = peak_bytes(lambda: weight.exp().exp().exp().sum().backward())
    weight.grad = None
    found = peak_of(lambda: weight.exp().exp().exp().sum().backward())
    assert found == pytest.approx(expected, rel=1e-4)
    assert found >= 4 * 4 * SIZE


@pytest.mark.slow
def test_allocations_of_compiled_code_count() -> None:
    weight = torch.zeros(1024, 1024)

    @torch.compile
    def product() -> torch.Tensor:
        powers = weight.exp()
        return powers @ powers.T

    product()
    assert peak_of(product) == pytest.approx(2 * weight.nbytes, rel=1e-3)


def test_peak_of_a_step_matches_its_live_tensors(build_training: Callable[[], Training]) -> None:
    training = build_training()
    training.run(num_warmup_steps=1, num_steps=1)
    # An independent count: the results of operations, one by one.
    with LiveBytes() as followed:
        training.run(num_warmup_steps=1, num_steps=1)
    found = allocated_bytes(training.trace())
    assert followed.peak <= found < 2 * followed.peak  # plus internal buffers
    # Only the weights, allocated earlier, outlive a round.
    assert followed.live < 0.01 * followed.peak


def test_peak_of_main_memory_can_be_reset(build_training: Callable[[], Training]) -> None:
    training = build_training()
    before = peaks(training.device, 0).resident
    large = torch.zeros(1 << 27)
    assert peaks(training.device, 0).resident >= before + (1 << 28)
    del large
    release_memory()
    reset_peaks(training.device)
    assert peaks(training.device, 0).resident < before + (1 << 28)


@pytest.mark.parametrize(("limit", "largest"), [(100, 64), (64, 64), (63, 32), (4, 4), (3, 0)])
def test_largest_batch_is_found_by_doubling(
    limit: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_use, "release_memory", lambda: None)  # slow
    tried = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError

    assert largest_batch(attempt, 4) == largest
    assert tried == sorted(set(tried))
    assert tried[-1] == max(2 * largest, 4)


def test_other_errors_are_not_mistaken_for_out_of_memory() -> None:
    def attempt(size: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        largest_batch(attempt, 4)
