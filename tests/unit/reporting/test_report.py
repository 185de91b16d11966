"""Reports of synthetic runs, number by number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from nvae_lightning.reporting import Layout, Run, as_layout, report
from nvae_lightning.reporting.order import Cell, pooled_variance

from .conftest import MakeRun


def _layout(**changes: Any) -> Layout:
    """Two rows and one column, like the last column of Table 4."""
    values: dict[str, Any] = {
        "title": "Table of two",
        "source": "A paper, Table 1",
        "paper_budget": "much",
        "varies": ["model.residual_posterior"],
        "orders": ["rows"],
        "rows": [
            {"label": "residual", "where": {"model.residual_posterior": True}},
            {"label": "absolute", "where": {"model.residual_posterior": False}},
        ],
        "columns": [
            {"label": "NLL", "metric": "test/nll", "digits": 3, "published": [3.16, 3.19]}
        ],
    }
    return as_layout({**values, **changes})


def _sweep(
    make_run: MakeRun, residual: Sequence[float], absolute: Sequence[float], **settings: Any
) -> list[Run]:
    runs = []
    for flag, values in ((True, residual), (False, absolute)):
        for seed, value in enumerate(values):
            own = {"seed": seed, "model.residual_posterior": flag, **settings}
            runs.append(make_run(str(len(runs)), own, {"test/nll": value}))
    return runs


def _row(markdown: str, label: str) -> list[str]:
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_seeds_become_mean_and_standard_error(make_run: MakeRun) -> None:
    made = report(_layout(), _sweep(make_run, [5.0, 5.2, 5.1], [5.5, 5.5, 5.9]))
    error = statistics.stdev([5.0, 5.2, 5.1]) / math.sqrt(3)
    assert _row(made.markdown, "residual") == [f"5.100 ± {error:.3f} (3)", "3.16"]
    assert _row(made.markdown, "absolute") == ["5.633 ± 0.133 (3)", "3.19"]
    (panel,) = made.comparisons
    assert panel.measured == pytest.approx([5.1, 5.6333], abs=1e-4)
    assert panel.errors == pytest.approx([error, 0.4 / 3])
    assert panel.published == [3.16, 3.19]


def test_report_states_the_budget(make_run: MakeRun) -> None:
    rows = [
        {"step": 49.0, "train/images_per_second": 24.0 / 9.0},
        {"step": 100.0, "test/nll": 5.0, "test/num_images": 20.0},
    ]
    runs = [
        make_run("0", rows=rows),
        make_run("1", {"model.residual_posterior": False, "seed": 3}, rows=rows),
    ]
    text = report(_layout(), runs).markdown
    for line in (
        "The paper's: much.",
        "data: image_folder, 32x32x3, 8-bit",
        "model: tiny, 4 channels, 3 + 5 groups",
        "training: 100 steps of 24 images, 2,400 images seen, 32-true",
        "test: 20 images, 10 importance samples",
        "seeds: 0, 3",
        "device: CPU (one), 1 thread",
        "version: 0.1.0",
        "time: 0.50 hours of training steps in all 2 runs",
    ):
        assert f"- {line}\n" in text


@pytest.mark.parametrize(
    ("residual", "absolute", "verdict"),
    [
        ([5.0, 5.1], [6.0, 6.1], "lower by 1.000 ± 0.071: **as in the paper**"),
        ([6.0, 6.1], [5.0, 5.1], "higher by 1.000 ± 0.071: **reversed**"),
        ([5.0, 5.4], [5.1, 5.7], "lower by 0.200 ± 0.361: **within the noise**"),
        ([5.0], [6.0], "lower by 1.000: **one seed, so that the noise is unknown**"),
    ],
)
def test_order_is_compared_with_the_paper(
    make_run: MakeRun, residual: list[float], absolute: list[float], verdict: str
) -> None:
    text = report(_layout(), _sweep(make_run, residual, absolute)).markdown
    assert "- NLL: residual (3.16) is below absolute (3.19) in the paper; here" in text
    assert verdict in text
    assert "of 1. The noise is estimated" in text


@pytest.mark.parametrize(
    ("absolute", "verdict"),
    [([5.1, 5.2], "within the noise, as expected"), ([7.0, 7.1], "not equal here")],
)
def test_equal_results_of_the_paper_may_differ_only_by_noise(
    make_run: MakeRun, absolute: list[float], verdict: str
) -> None:
    columns = [{"label": "NLL", "metric": "test/nll", "published": [1.8, 1.8]}]
    runs = _sweep(make_run, [5.0, 5.1], absolute)
    assert f"**{verdict}**" in report(_layout(columns=columns), runs).markdown


def test_noise_is_pooled_over_cells() -> None:
    cells = [Cell([1.0, 2.0, 3.0], None), Cell([5.0, 7.0], None), Cell([4.0], None)]
    assert pooled_variance(cells) == (pytest.approx((2.0 + 2.0) / 3), 3)
    assert pooled_variance(cells[2:])[1] == 0


def test_different_budgets_are_refused(make_run: MakeRun) -> None:
    runs = _sweep(make_run, [5.0], [5.5])
    runs.append(make_run("long", {"trainer.max_steps": 200, "seed": 1}, {"step": 200.0}))
    with pytest.raises(ValueError, match=r"100 in 0, 1, 200 in long.*allow_different_budgets"):
        report(_layout(), runs)
    text = report(_layout(), runs, allow_different_budgets=True).markdown
    assert "**The runs have different budgets**" in text
    assert "- trainer.max_steps is 100 in 0, 1, 200 in long\n" in text
    assert "- steps trained is 100 in 0, 1, 200 in long\n" in text


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("dataset.batch_size", 8),
        ("dataset.image.size", 64),
        ("dataset.root", "others"),
        ("model.hierarchy.channels", 16),
        ("num_importance_samples", 100),
        ("penalty.weight", 0.1),
        ("optimizer.lr", 0.1),
    ],
)
def test_every_other_setting_belongs_to_the_budget(
    make_run: MakeRun, setting: str, value: object
) -> None:
    runs = _sweep(make_run, [5.0], [5.5])
    runs[1] = make_run("1", {"model.residual_posterior": False, setting: value})
    with pytest.raises(ValueError, match=f"more than the table compares: {setting} is"):
        report(_layout(), runs)


def test_number_of_tested_images_belongs_to_the_budget(make_run: MakeRun) -> None:
    absolute = make_run("1", {"model.residual_posterior": False}, {"test/num_images": 5.0})
    with pytest.raises(ValueError, match="images tested is 20 in 0, 5 in 1"):
        report(_layout(), [make_run("0"), absolute])


def test_device_matters_where_cost_is_compared(make_run: MakeRun) -> None:
    runs = _sweep(make_run, [5.0], [5.5])
    runs[1] = make_run("1", {"model.residual_posterior": False, "device": "a GPU"})
    assert "device: CPU (one), 1 thread or a GPU" in report(_layout(), runs).markdown
    with pytest.raises(ValueError, match="device is CPU"):
        report(_layout(compares_cost=True), runs)


def test_columns_compared_separately_may_have_different_budgets(make_run: MakeRun) -> None:
    columns = [
        {"label": name, "metric": "test/nll", "published": [1.0, 2.0],
         "where": {"choices.dataset": name}}
        for name in ("mnist", "cifar10")
    ]  # fmt: skip
    layout = _layout(columns=columns, compared="columns")
    runs = [
        make_run(
            f"{name}{flag}",
            {
                "choices.dataset": name, "model.residual_posterior": flag,
                "trainer.max_steps": steps,
            },
        )
        for name, steps in (("mnist", 10), ("cifar10", 20))
        for flag in (True, False)
    ]  # fmt: skip
    text = report(layout, runs).markdown
    assert "- Here, mnist:" in text
    assert "- Here, cifar10:" in text
    with pytest.raises(ValueError, match=r"choices\.dataset is mnist"):
        report(_layout(columns=columns), runs)


def test_unfinished_and_foreign_runs_are_named_and_left_out(make_run: MakeRun) -> None:
    runs = _sweep(make_run, [5.0], [5.5])
    runs.append(make_run("killed", {"seed": 7}, rows=[{"step": 3.0, "train/loss": 1.0}]))
    runs.append(make_run("foreign", {"model.residual_posterior": None}))
    made = report(_layout(), runs)
    assert "- killed is left out: its training or test has not finished" in made.markdown
    assert "- foreign is left out: it matches no cell of the table" in made.markdown
    assert _row(made.markdown, "residual") == ["5.000 (1)", "3.16"]
    assert "seeds: 0\n" in made.markdown


def test_rollbacks_are_reported(make_run: MakeRun) -> None:
    first, second = _sweep(make_run, [5.0], [5.5])
    (test,) = first.rows
    rows = [{"step": 9.0, "train/skipped_steps": 12.0, "train/rollbacks": 1.0}, test]
    first = make_run("0", rows=[*rows])
    text = report(_layout(), [first, second]).markdown
    assert "0 was rolled back once" in text


def test_diverged_runs_count_in_the_fraction_of_finite_runs(make_run: MakeRun) -> None:
    columns = [
        {"label": "finite", "metric": "finite", "published": [None, None]},
        {"label": "NLL", "metric": "test/nll", "published": [None, None]},
    ]
    runs = _sweep(make_run, [5.0, math.inf], [5.5])
    diverged = {"seed": 8, "model.residual_posterior": False}
    runs.append(make_run("8", diverged, rows=[{"step": 3.0, "train/diverged": 1.0}]))
    text = report(_layout(columns=columns), runs).markdown
    assert _row(text, "residual") == ["0.50 ± 0.50 (2)", "5.00 (1)"]
    assert _row(text, "absolute") == ["0.50 ± 0.50 (2)", "5.50 (1)"]
    assert "8 diverged at step 4" in text
    assert "1 has a non-finite NLL, which is left out" in text


def test_two_runs_of_one_cell_and_seed_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(ValueError, match="'0' and 'again' have the same cell"):
        report(_layout(), [make_run("0"), make_run("again")])


def test_unfinished_or_unmatched_runs_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(ValueError, match="none of the 1 has finished"):
        report(_layout(), [make_run("0", rows=[])])
    with pytest.raises(ValueError, match="none of the 1 has the settings"):
        report(_layout(), [make_run("0", {"model.residual_posterior": None})])


def _by_groups() -> Layout:
    columns = [
        {"label": f"L = {number}", "metric": "test/nll", "published": [paper, None],
         "where": {"model.hierarchy.num_groups": [number]}}
        for number, paper in ((10, 3.0), (20, 2.0))
    ]  # fmt: skip
    return _layout(
        columns=columns,
        varies=["model.residual_posterior", "model.hierarchy.num_groups"],
        scaled="model.hierarchy.num_groups",
        orders=["columns"],
    )


def test_scaled_down_groups_replace_the_papers_in_order(make_run: MakeRun) -> None:
    runs = [
        make_run(str(n), {"model.hierarchy.num_groups": [n]}, {"test/nll": 9.0 - n})
        for n in (4, 1)
    ]
    text = report(_by_groups(), runs).markdown
    assert "| L = 10 (here 1) | paper | L = 20 (here 4) | paper |" in text
    assert _row(text, "residual") == ["8.00 (1)", "3", "5.00 (1)", "2"]
    assert "residual: L = 20 (here 4) (2) is below L = 10 (here 1) (3) in the paper" in text
    with pytest.raises(ValueError, match="is 4, but the paper compares 2 values, 10, 20"):
        report(_by_groups(), runs[:1])


def test_some_of_the_papers_groups_may_be_missing(make_run: MakeRun) -> None:
    run = make_run("0", {"model.hierarchy.num_groups": [20]})
    assert _row(report(_by_groups(), [run]).markdown, "residual") == ["–", "3", "5.00 (1)", "2"]


def test_further_dataset_gets_its_own_column(make_run: MakeRun) -> None:
    columns = [
        {"label": "CIFAR-10", "metric": "test/nll", "published": [3.0, 2.0],
         "where": {"choices.dataset": "cifar10"}}
    ]  # fmt: skip
    others = {"axis": "columns", "setting": "choices.dataset", "metric": "test/nll"}
    text = report(_layout(columns=columns, others=others), [make_run("0")]).markdown
    assert "| CIFAR-10 | paper | image_folder |\n" in text
    assert _row(text, "residual") == ["–", "3", "5.00 (1)"]


def test_further_weight_gets_its_own_row(make_run: MakeRun) -> None:
    changes = {
        "rows": [{"label": "λ = 1", "where": {"penalty.weight": 1.0}}],
        "columns": [{"label": "NLL", "metric": "test/nll", "published": [None]}],
        "varies": ["penalty.weight"],
        "others": {"axis": "rows", "setting": "penalty.weight"},
    }
    text = report(_layout(**changes), [make_run("0")]).markdown
    assert _row(text, "λ = 1") == ["–"]
    assert _row(text, "0.01") == ["5.00 (1)"]


def test_relative_values_are_ratios_to_the_rows_mean(make_run: MakeRun) -> None:
    columns = [
        {"label": "memory", "metric": "test/nll", "published": [1.0, 0.6],
         "relative_to": "residual"}
    ]  # fmt: skip
    text = report(_layout(columns=columns), _sweep(make_run, [4.0, 6.0], [3.0, 3.0])).markdown
    assert _row(text, "residual") == ["1.00 ± 0.20 (2)", "1"]
    assert _row(text, "absolute") == ["0.60 ± 0.00 (2)", "0.6"]
