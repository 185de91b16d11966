"""Implementations of units and bodies agree with the plain layers."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nvae_lightning.backends import Compute, units
from nvae_lightning.backends.units import (
    FoldingSequential,
    FusedBatchNorm,
    FusedUnit,
)
from nvae_lightning.model import DepthwiseCell, RegularCell, Resampling
from nvae_lightning.model.layers import DataDependentConv2d, NormActConv
from nvae_lightning.model.normalization import BatchNorm

RESAMPLING = pytest.mark.parametrize(
    ("resampling", "out_channels"),
    [(Resampling.SAME, 4), (Resampling.DOWN, 8), (Resampling.UP, 2)],
)


def _with_statistics(cell: nn.Module) -> nn.Module:
    """Give normalisations statistics and weights that change their input."""
    for norm in cell.modules():
        if isinstance(norm, BatchNorm):
            for values in (norm.weight, norm.bias, norm.running_mean):
                assert values is not None
                nn.init.normal_(values)
            assert norm.running_var is not None
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return cell


def _applied(cell: nn.Module, **settings: Any) -> nn.Module:
    """Return a copy with settings applied."""
    cell = copy.deepcopy(cell)
    Compute(**settings).apply(cell)
    return cell


@RESAMPLING
@pytest.mark.parametrize(
    "settings", [{"recompute": "activation"}, {"recompute": "normalization"}], ids=str
)
def test_training_agrees_with_the_plain_layers(
    build_cell: Callable[..., nn.Module],
    resampling: Resampling,
    out_channels: int,
    settings: dict[str, Any],
) -> None:
    plain = _with_statistics(build_cell(4, out_channels, resampling)).double()
    fused = _applied(plain, **settings)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    results = []
    for cell in (plain, fused):
        output = cell(x)
        output.square().sum().backward()
        results.append([output, *(p.grad for p in cell.parameters()), *cell.buffers()])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_implementations_are_subclasses_that_can_be_removed() -> None:
    cells = nn.ModuleList([RegularCell(4, 4), DepthwiseCell(4, 4)])
    plain = [type(module) for module in cells.modules()]
    Compute(recompute="activation", checkpoint_min_size=1).apply(cells)
    kinds = {type(module) for module in cells.modules()}
    assert {FusedUnit, FusedBatchNorm, FoldingSequential} < kinds
    assert NormActConv not in kinds
    assert all("forward" in vars(cell) for cell in cells)
    assert isinstance(cells[0], RegularCell)
    Compute(recompute="nothing").apply(cells)
    assert not any("forward" in vars(cell) for cell in cells)
    kinds = [type(module) for module in cells.modules()]
    assert [nn.Sequential if k is FoldingSequential else k for k in kinds] == plain


def test_a_unit_of_another_class_keeps_its_forward_pass() -> None:
    class Doubled(NormActConv):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    cell = RegularCell(4, 4, squeeze_excitation=False).double()
    unit = cell.get_submodule("body.0")
    unit.__class__ = Doubled
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    for mode in (True, False):
        with torch.no_grad():
            expected = copy.deepcopy(cell).train(mode)(x)
            torch.testing.assert_close(_applied(cell).train(mode)(x), expected)


@pytest.mark.parametrize("settings", [{}, {"checkpoint_min_size": 1}], ids=str)
def test_cells_are_copied_and_pickled_with_their_implementation(settings: dict[str, Any]) -> None:
    cell = _applied(_with_statistics(DepthwiseCell(4, 4)), **settings)
    x = torch.randn(2, 4, 8, 8)
    copies = [copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))]
    expected = cell(x)
    for other in copies:
        assert [type(m) for m in other.modules()] == [type(m) for m in cell.modules()]
        assert torch.equal(other(x), expected)
        torch.testing.assert_close(dict(other.named_buffers()), dict(cell.named_buffers()))


HOOKED = ("", ".norm", ".activation", ".convolution")


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(
    "path", [*(f"body.{i}{layer}" for i in range(3) for layer in HOOKED), "body.3", "body"]
)
def test_layers_with_hooks_are_called(path: str, trains: bool) -> None:
    cell = _applied(DepthwiseCell(4, 4, expansion=2.0).train(trains))
    x = torch.randn(2, 4, 8, 8)
    expected = cell(x)
    called = []
    layer = cell.get_submodule(path)
    layer.register_forward_hook(lambda module, *_: called.append(module))
    with torch.set_grad_enabled(trains):
        torch.testing.assert_close(cell(x), expected)
    assert called == [layer]


@RESAMPLING
def test_inference_on_a_cpu_agrees_with_the_plain_layers(
    build_cell: Callable[..., nn.Module], resampling: Resampling, out_channels: int
) -> None:
    cell = _with_statistics(build_cell(4, out_channels, resampling)).double().eval()
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    expected = cell(x)
    folded = _applied(cell)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(folded(x), expected)  # with gradients nothing is folded


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the parts, for caches in which only one image fits."""
    sizes: list[int] = []
    run = units._run

    def record(steps: Any, x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return run(steps, x)

    monkeypatch.setattr(units, "_run", record)
    monkeypatch.setattr(units, "_CACHED_BYTES", 1)
    return sizes


@RESAMPLING
def test_inference_in_parts_agrees_with_the_plain_layers(
    build_cell: Callable[..., nn.Module],
    resampling: Resampling,
    out_channels: int,
    parts: list[int],
) -> None:
    cell = _with_statistics(build_cell(4, out_channels, resampling)).double().eval()
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(_applied(cell)(x), cell(x), rtol=1e-12, atol=1e-12)
    is_unknown = any(isinstance(layer, DataDependentConv2d) for layer in cell.modules())
    assert parts == ([3] if is_unknown else [1, 1, 1])


@torch.no_grad()
def test_batches_stay_whole_where_parts_would_be_seen(parts: list[int]) -> None:
    x = torch.randn(3, 4, 8, 8)
    for trains, hooked in ((True, None), (False, "body.1.convolution"), (False, "body.0")):
        cell = _applied(DepthwiseCell(4, 4).train(trains))
        if hooked is not None:
            cell.get_submodule(hooked).register_forward_hook(lambda *_: None)
        cell(x)
    assert parts == [3, 3, 3]


@torch.no_grad()
def test_parts_fill_the_caches(parts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    cell = _applied(DepthwiseCell(4, 4, expansion=2.0).eval())
    monkeypatch.setattr(units, "_CACHED_BYTES", 5 * 8 * 8 * 8 * 4)  # five images of 8 channels
    cell(torch.randn(12, 4, 8, 8))
    assert parts == [4, 4, 4]


@pytest.mark.parametrize(("build", "left"), [(RegularCell, 1), (DepthwiseCell, 0)])
@torch.no_grad()
def test_inference_on_a_cpu_folds_every_normalisation_beside_a_convolution(
    monkeypatch: pytest.MonkeyPatch, build: type[nn.Module], left: int
) -> None:
    normalized = []
    forward = BatchNorm.forward
    monkeypatch.setattr(BatchNorm, "forward", lambda *args: normalized.append(1) or forward(*args))
    _applied(build(4, 4)).eval()(torch.randn(2, 4, 8, 8))
    assert len(normalized) == left


@torch.no_grad()
def test_inference_on_a_cpu_upsamples_right_before_the_depthwise_convolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []
    silu = torch.nn.functional.silu
    monkeypatch.setattr(
        torch.nn.functional,
        "silu",
        lambda x, **options: sizes.append(x.shape[-1]) or silu(x, **options),
    )
    _applied(DepthwiseCell(4, 2, Resampling.UP)).eval()(torch.randn(2, 4, 8, 8))
    assert sizes == [8, 16]


def test_statistics_are_also_measured_without_gradients() -> None:
    cell = _applied(_with_statistics(DepthwiseCell(4, 4))).double().eval()
    for norm in cell.modules():
        if isinstance(norm, BatchNorm):
            norm.train()  # as in a recalibration
    other = copy.deepcopy(cell)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    expected = cell(x)
    with torch.no_grad():
        torch.testing.assert_close(other(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(other.named_buffers()), dict(cell.named_buffers()))


@pytest.mark.parametrize("build", [RegularCell, DepthwiseCell])
@torch.no_grad()
def test_inference_in_16_bits_is_as_accurate_as_with_the_plain_layers(
    build: type[nn.Module],
) -> None:
    cell = _applied(_with_statistics(build(16, 16))).eval()
    x = torch.randn(4, 16, 8, 8)
    expected = cell(x)

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return (cell(x) - expected).square().mean().sqrt().item()

    folded = error()
    with torch.enable_grad():
        assert folded < 1.5 * error()
