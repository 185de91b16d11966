"""Quantities computed from a run's metrics."""

import dataclasses
import math

import pytest

from nvae_lightning.reporting.run import Quantity

from .conftest import MakeRun

ROWS = [
    {"step": 9.0, "train/images_per_second": 10.0, "train/rate": 4.0, "train/grad_norm": 3.0},
    {"step": 19.0, "train/images_per_second": 40.0, "train/rate": 2.0, "train/grad_norm": 9.0},
    {"step": 95.0, "train/rate": 1.5, "train/active_channels/00": 2.0},
    {"step": 99.0, "train/rate": 1.0, "train/active_channels/00": 3.0},
    {"step": 99.0, "train/active_channels/01": 4.0},
    {"step": 100.0, "test/nll": 7.0, "test/active_channels/00": 0.0},
    {"step": 100.0, "test/active_channels/01": 5.0},
]


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [
        (Quantity("test/nll"), 7.0),
        (Quantity("train/rate"), 1.0),
        (Quantity("train/rate", over="end"), 1.25),
        (Quantity("train/rate", over="median"), 1.75),
        (Quantity("train/rate", over="late_max"), 1.5),
        (Quantity("train/grad_norm", over="late_max"), 9.0),
        (Quantity("train/grad_norm", over="end"), 9.0),
        (Quantity("train/active_channels/*", over="end"), 2.5 + 4.0),
        (Quantity("test/active_channels/*", each="count"), 2.0),
        (Quantity("test/active_channels/*", each="zeros"), 1.0),
        (Quantity("train/rate", in_bits=True), 1.0 / (3 * 32 * 32 * math.log(2))),
        (Quantity("finite"), 1.0),
        (Quantity("train/loss"), None),
    ],
)
def test_quantity_of_rows(make_run: MakeRun, quantity: Quantity, expected: float | None) -> None:
    found = make_run("0", rows=ROWS).value(quantity)
    assert found == (None if expected is None else pytest.approx(expected))


def test_hours_include_all_steps(make_run: MakeRun) -> None:
    run = make_run("0", rows=ROWS)
    assert run.images_per_step == 4 * 2 * 3
    assert run.num_steps == 100
    # 10 steps at 10 images per second, 10 at 40, and the other 80 at their mean.
    expected = (10 * 24 / 10 + 10 * 24 / 40) / 20 * 100 / 3600
    assert run.value(Quantity("hours")) == pytest.approx(expected)


def test_computation_includes_all_images(make_run: MakeRun) -> None:
    run = make_run("0", rows=ROWS)
    assert run.value(Quantity("images")) == 100 * 4 * 2 * 3
    assert run.value(Quantity("teraflop")) is None
    counted = dataclasses.replace(run, flops_per_image=lambda: 5e9)
    assert counted.value(Quantity("teraflop")) == pytest.approx(2400 * 5e9 / 1e12)


def test_runs_end_with_a_test_or_with_divergence(make_run: MakeRun) -> None:
    rows = [{"step": 4.0, "train/loss": 1.0}]
    killed = make_run("0", rows=rows)
    assert not killed.has_ended
    diverged = make_run("1", rows=[*rows, {"step": 6.0, "train/diverged": 1.0}])
    assert diverged.has_ended
    assert diverged.has_diverged
    assert (diverged.num_steps, diverged.value(Quantity("finite"))) == (7, 0.0)
    infinite = make_run("2", metrics={"test/nll": math.inf})
    assert infinite.has_ended
    assert infinite.value(Quantity("finite")) == 0.0
    # A run resumed after its divergence.
    saved = make_run("3", rows=[{"step": 6.0, "train/diverged": 1.0}, *ROWS])
    assert saved.is_finished
    assert not saved.has_diverged


def test_settings_match_one_of_the_conditions(make_run: MakeRun) -> None:
    run = make_run("0")
    assert run.fits([{}])
    assert run.fits([{"seed": 1}, {"seed": 0, "model.hierarchy.num_groups": [3, 9]}])
    assert run.fits([{"model.normalization._target_": None}])
    assert not run.fits([{"seed": 0, "model.residual_posterior": False}])
    assert not run.fits([])
