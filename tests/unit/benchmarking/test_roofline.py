"""Rooflines of steps with known computations and memory traffic."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import nvae_lightning.benchmarking.roofline as roofline_module
from nvae_lightning.benchmarking import Cost, Roofline, cost_of, measure_roofline
from nvae_lightning.benchmarking.roofline import _Counter
from nvae_lightning.cli.config_root import CONFIG_ROOT

from .conftest import BATCH, Build


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions_count_forward_and_backward(groups: int) -> None:
    x = torch.zeros(2, 8, 10, 10, requires_grad=True)
    weight = torch.zeros(16, 8 // groups, 3, 3, requires_grad=True)
    with _Counter() as counter:
        y = F.conv2d(x, weight, groups=groups)
    flops = 2 * (2 * 16 * 8 * 8) * (8 // groups) * 9
    assert counter.flops == flops
    assert counter.bytes == x.nbytes + weight.nbytes + y.nbytes
    with _Counter() as counter:
        y.sum().backward()
    assert counter.flops == 2 * flops
    assert counter.bytes == 2 * (x.nbytes + weight.nbytes) + y.nbytes


def test_matrix_products_count_and_elementwise_work_does_not() -> None:
    x, weight = torch.zeros(4, 8), torch.zeros(16, 8)
    with _Counter() as counter:
        y = F.silu(F.linear(x, weight) + 1).exp()
    assert counter.flops == 2 * 4 * 8 * 16
    assert counter.bytes == x.nbytes + weight.nbytes + y.nbytes


@pytest.mark.parametrize(
    ("dataset", "gflop"),
    [
        ("mnist", 2.53),
        ("cifar10", 66.6),
        pytest.param("celeba64", 83.1, marks=pytest.mark.slow),
        pytest.param("imagenet32", 138.0, marks=pytest.mark.slow),
        pytest.param("celeba_hq", 328.0, marks=pytest.mark.slow),
    ],
)
def test_published_models_have_the_known_flops_per_image(dataset: str, gflop: float) -> None:
    with initialize_config_dir(str(CONFIG_ROOT / "conf"), version_base="1.3"):
        config = compose("benchmark", [f"dataset={dataset}", "model=base"])
    build = partial(instantiate, config.module, _convert_="all")
    # One importance sample: one bottom-up and one top-down pass.
    cost = cost_of(build, "evaluate", batch_size=2, precision="32-true")
    assert cost.flops / 2 / 1e9 == pytest.approx(gflop, rel=0.003)


_COUNTED: dict[object, Cost] = {}


def count(build_module: Build, what: str, precision: str = "32-true", num: int = 1) -> Cost:
    """Count the cost of a step, once per session."""
    key = (build_module.__qualname__, what, precision, num)
    if key not in _COUNTED:
        _COUNTED[key] = cost_of(
            build_module, what, batch_size=BATCH, precision=precision, num_importance_samples=num
        )
    return _COUNTED[key]


def test_training_step_costs_three_passes_and_the_penalties(build_module: Build) -> None:
    def without_penalty() -> Any:
        module = build_module()
        module.spectral_penalty = None
        return module

    forward = count(build_module, "evaluate").flops
    step = count(without_penalty, "train").flops  # type: ignore[arg-type]
    stem = build_module().model.encoder.stem
    image_gradient = 2 * BATCH * 8 * 8 * stem.weight.numel()  # not needed
    assert step == 3 * forward - image_gradient
    weights = [
        m.weight.numel() for m in build_module().modules() if isinstance(m, torch.nn.Conv2d)
    ]
    # One product for the value and one for its gradient; no power iterations on a CPU.
    assert count(build_module, "train").flops == step + 2 * 2 * sum(weights)


def test_each_importance_sample_costs_a_top_down_pass(build_module: Build) -> None:
    one, two, five = (count(build_module, "evaluate", num=number).flops for number in (1, 2, 5))
    assert five - two == 3 * (two - one)
    assert 0 < two - one < one
    assert count(build_module, "sample").flops < two - one  # without the posteriors


def test_bytes_depend_on_the_dtype(build_module: Build) -> None:
    full = count(build_module, "evaluate").bytes
    assert count(build_module, "evaluate", "bf16-mixed").bytes == full // 2
    assert count(build_module, "evaluate", "64-true").bytes == 2 * full
    steps = [count(build_module, "train", p) for p in ("32-true", "bf16-mixed")]
    assert steps[0].flops == steps[1].flops
    assert 0.5 < steps[1].bytes / steps[0].bytes < 1.0  # weights and penalties stay float32


def test_training_step_includes_the_optimiser_state(build_module: Build) -> None:
    adamax = count(build_module, "train").bytes

    def with_sgd() -> Any:
        module = build_module()
        module.optimizer = partial(torch.optim.SGD, lr=0.1)
        return module

    weights = sum(p.nbytes for p in build_module().model.parameters())
    assert adamax - count(with_sgd, "train").bytes == 4 * weights  # two moments, read and written


def test_loading_reads_and_writes_each_byte(build_module: Build) -> None:
    assert count(build_module, "data") == Cost(0, 2 * BATCH * 3 * 8 * 8)


def test_unknown_precision_is_refused(build_module: Build) -> None:
    with pytest.raises(ValueError, match=r"trainer.precision: got transformer-engine.*32-true"):
        count(build_module, "train", "transformer-engine")


def test_roofline_is_the_larger_of_compute_and_memory_time() -> None:
    roofline = Roofline(flops_per_second=100.0, bytes_per_second=10.0)
    assert roofline.seconds(Cost(flops=1000, bytes=50)) == 10.0
    assert roofline.seconds(Cost(flops=100, bytes=50)) == 5.0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_roofline_is_measured(precision: str) -> None:
    roofline = measure_roofline(
        torch.device("cpu"), precision, side=64, channels=8, num_bytes=1 << 20
    )
    assert roofline.flops_per_second > 1e6
    assert roofline.bytes_per_second > 1e6


@pytest.mark.parametrize(("product", "convolution"), [(2.0, 1.0), (1.0, 4.0)])
def test_roofline_is_the_faster_of_product_and_convolution(
    product: float, convolution: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([product, convolution, 1.0])
    monkeypatch.setattr(roofline_module, "_best_seconds", lambda *_: next(seconds))
    found = measure_roofline(torch.device("cpu"), "32-true", side=64, channels=8, num_bytes=64)
    speeds = 2 * 64**3 / product, 2 * (32 * 8 * 16 * 16) * (8 * 3 * 3) / convolution
    assert found.flops_per_second == max(speeds)
