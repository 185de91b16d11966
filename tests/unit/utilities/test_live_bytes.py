"""Peak bytes of tensors in programs whose peak is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from nvae_lightning.utilities.live_bytes import peak_bytes

X = torch.zeros(256)
SIZE = X.nbytes


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: None, 0),
        (lambda: X, 0),
        (lambda: X + 1, SIZE),
        (lambda: torch.zeros(256), SIZE),
        (lambda: X.clone(), SIZE),
        (lambda: X.double(), 2 * SIZE),
        (lambda: X.float(), 0),  # no copy
        (lambda: X.to(torch.bfloat16), SIZE // 2),
        (lambda: X.contiguous(), 0),
        (lambda: torch.stack([X, X]), 2 * SIZE),
        (lambda: torch.max(X.view(16, 16), 1), 16 * 4 + 16 * 8),
        (lambda: F.conv2d(X.view(1, 1, 16, 16), torch.ones(2, 1, 3, 3)), 2 * 14 * 14 * 4 + 72),
        (lambda: torch.empty(0), 0),
        (lambda: torch.cat([torch.empty(0), X]), SIZE),
        (lambda: torch.add(input=X, other=X), SIZE),
    ],
)
def test_results_of_operations_are_counted(function: Callable[[], object], expected: int) -> None:
    assert peak_bytes(function) == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.view(2, 128), 0),
        (lambda x: x[3:7], 0),
        (lambda x: x.view(16, 16).T, 0),
        (lambda x: x.expand(1000, 256), 0),
        (lambda x: x.chunk(4), 0),
        (lambda x: x.detach(), 0),
        (lambda x: x.expand(4, 256).contiguous(), 4 * SIZE),
        (lambda x: (x + 1).view(2, 128).unbind(), SIZE),
        (lambda x: torch.stack([x, x]).unbind()[0].view(16, 16), 2 * SIZE),
    ],
)
def test_views_are_not_counted(function: Callable[[Tensor], object], expected: int) -> None:
    assert peak_bytes(lambda: function(X)) == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.add_(1), 0),
        (lambda x: x[:128].mul_(2).add_(1), 0),
        (lambda x: F.silu(x, inplace=True), 0),
        (lambda x: torch.add(X, 1, out=x), 0),
        (lambda x: x.copy_(torch.ones(1).expand(256)), 4),
        (lambda x: (x + 1).add_(1).mul_(2), SIZE),
    ],
)
def test_changes_in_place_are_not_counted(
    function: Callable[[Tensor], object], expected: int
) -> None:
    x = torch.zeros(256)
    assert peak_bytes(lambda: function(x)) == expected


def test_freed_memory_is_reused() -> None:
    def one_after_another() -> None:
        for _ in range(10):
            y = X + 1
            del y

    def side_by_side() -> list[Tensor]:
        return [X + 1 for _ in range(10)]

    def chain() -> Tensor:
        y = X
        for _ in range(10):
            y = y + 1  # its input and the result
        return y

    def peak_in_the_middle() -> Tensor:
        large = torch.stack([X] * 8)
        small = large.sum()
        del large
        return small + torch.stack([X] * 7).sum()

    assert peak_bytes(one_after_another) == SIZE
    assert peak_bytes(side_by_side) == 10 * SIZE
    assert peak_bytes(chain) == 2 * SIZE
    assert peak_bytes(peak_in_the_middle) == 8 * SIZE + 4


def test_a_view_keeps_its_base_alive() -> None:
    def with_view() -> tuple[Tensor, Tensor]:
        view = (X + 1)[:2]
        return view, X + 1

    def without_view() -> tuple[float, Tensor]:
        value = (X + 1)[0].item()
        return value, X + 1

    assert peak_bytes(with_view) == 2 * SIZE
    assert peak_bytes(without_view) == SIZE


def test_tensors_held_elsewhere_count_while_they_are_held() -> None:
    held: list[Tensor] = []

    def hold() -> None:
        held.append(X + 1)
        held.append(X + 1)
        held.clear()
        held.append(X + 1)

    assert peak_bytes(hold) == 2 * SIZE
    # Earlier tensors are neither counted nor, when freed, subtracted.
    assert peak_bytes(lambda: (held.clear(), X + 1, X.expand(2, 256) + 1)[1]) == 3 * SIZE


def test_each_measurement_starts_at_zero() -> None:
    assert peak_bytes(lambda: torch.stack([X] * 9)) == 9 * SIZE
    assert peak_bytes(lambda: X + 1) == SIZE
    result = peak_bytes(lambda: X + 1), X + 1, X + 1
    assert result[0] == SIZE


def test_measurements_can_be_nested() -> None:
    inner: list[int] = []

    def outer() -> Tensor:
        y = X + 1
        inner.append(peak_bytes(lambda: torch.stack([y, y, y])))
        inner.append(peak_bytes(lambda: y.add_(1)))
        return y

    assert peak_bytes(outer) == 4 * SIZE
    assert inner == [3 * SIZE, 0]


def test_an_error_propagates_and_ends_the_measurement() -> None:
    def fail() -> None:
        _ = X + 1
        raise RuntimeError("of the program")

    with pytest.raises(RuntimeError, match="of the program"):
        peak_bytes(fail)
    assert _get_current_dispatch_mode() is None
    assert peak_bytes(lambda: X + 1) == SIZE


def test_tensors_saved_for_backward_are_counted() -> None:
    weight = torch.zeros(256, requires_grad=True)

    def with_gradient() -> Tensor:
        return (weight.exp().exp().exp()).sum()

    def without() -> Tensor:
        with torch.no_grad():
            return with_gradient()

    assert peak_bytes(with_gradient) == 3 * SIZE + 4
    assert peak_bytes(without) == 2 * SIZE


def test_memory_of_gradients_is_counted() -> None:
    weight = torch.zeros(256, requires_grad=True)
    assert peak_bytes(lambda: weight.sum().backward()) == SIZE + 8  # the sum and its gradient
    assert weight.grad is not None


def test_weights_of_a_module_are_not_counted() -> None:
    layer = nn.Linear(64, 4096)
    x = torch.zeros(2, 64)
    with torch.no_grad():
        assert peak_bytes(lambda: layer(x)) == 2 * 4096 * 4


def test_bytes_are_the_same_on_the_meta_device() -> None:
    # Meta tensors all have the same address.
    def program(x: Tensor) -> Any:
        y = x + 1
        return (y.view(2, 128) * 2).add_(1)

    assert peak_bytes(lambda: program(X)) == 2 * SIZE
    assert peak_bytes(lambda: program(X.to("meta"))) == 3 * SIZE  # including the copy of X


def test_measuring_does_not_change_results_or_random_numbers() -> None:
    results: list[Tensor] = []
    torch.manual_seed(3)
    expected = torch.randn(8)
    torch.manual_seed(3)
    peak_bytes(lambda: results.append(torch.randn(8)))
    assert torch.equal(results[0], expected)
