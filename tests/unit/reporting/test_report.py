"""Reports of made-up runs, number by number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from nvae_lightning.reporting import Layout, Run, as_layout, report
from nvae_lightning.reporting.order import Cell, Noise

from .conftest import MakeRun


def _layout(**changes: Any) -> Layout:
    """Two rows by one column, as Table 4's last one."""
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


def test_seeds_become_mean_and_standard_error_beside_the_paper(make_run: MakeRun) -> None:
    made = report(_layout(), _sweep(make_run, [5.0, 5.2, 5.1], [5.5, 5.5, 5.9]))
    error = statistics.stdev([5.0, 5.2, 5.1]) / math.sqrt(3)
    assert _row(made.markdown, "residual") == [f"5.100 ± {error:.3f} (3)", "3.16"]
    assert _row(made.markdown, "absolute") == ["5.633 ± 0.133 (3)", "3.19"]
    (panel,) = made.comparisons
    assert panel.measured == pytest.approx([5.1, 5.6333], abs=1e-4)
    assert panel.errors == pytest.approx([error, 0.4 / 3])
    assert panel.published == [3.16, 3.19]


def test_the_budget_is_stated(make_run: MakeRun) -> None:
    rows = [
        {"step": 49.0, "train/images_per_second": 24.0 / 9.0},
        {"step": 100.0, "test/nll": 5.0, "test/num_images": 20.0},
    ]
    runs = [
        make_run("0", rows=rows),
        make_run("1", {"model.residual_posterior": False, "seed": 3}, rows=rows),
    ]
    text = report(_layout(budget={"weight": "penalty.weight"}), runs).markdown
    for line in (
        "The paper's: much.",
        "data: image_folder, 32x32x3, 8-bit",
        "model: tiny, 4 channels, 3 + 5 groups",
        "training: 100 steps of 24 images, 2,400 images seen, 32-true",
        "test: 20 images, 10 importance samples",
        "weight: 0.01",
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
        ([6.0, 6.1], [5.0, 5.1], "higher by 1.000 ± 0.071: **the other way round**"),
        ([5.0, 5.4], [5.1, 5.7], "lower by 0.200 ± 0.361: **within the noise**"),
        ([5.0], [6.0], "lower by 1.000: **one seed: the noise is not known**"),
    ],
)
def test_the_papers_order_is_looked_for(
    make_run: MakeRun, residual: list[float], absolute: list[float], verdict: str
) -> None:
    text = report(_layout(), _sweep(make_run, residual, absolute)).markdown
    assert "- NLL: residual (3.16) is below absolute (3.19) in the paper; here" in text
    assert verdict in text
    assert "of 1. Noise is told" in text


@pytest.mark.parametrize(
    ("absolute", "verdict"),
    [([5.1, 5.2], "within the noise, as equal ones are"), ([7.0, 7.1], "not equal here")],
)
def test_what_the_paper_has_equal_may_differ_by_noise_only(
    make_run: MakeRun, absolute: list[float], verdict: str
) -> None:
    columns = [{"label": "NLL", "metric": "test/nll", "published": [1.8, 1.8]}]
    runs = _sweep(make_run, [5.0, 5.1], absolute)
    assert f"**{verdict}**" in report(_layout(columns=columns), runs).markdown


def test_noise_is_pooled_over_cells() -> None:
    cells = [Cell([1.0, 2.0, 3.0], None), Cell([5.0, 7.0], None), Cell([4.0], None)]
    noise = Noise.of(cells)
    assert noise is not None
    assert noise.degrees == 3
    assert noise.variance == pytest.approx((2.0 + 2.0) / 3)
    assert noise.of_difference(cells[0], cells[2]) == pytest.approx(math.sqrt(4 / 3 * (1 / 3 + 1)))
    # Student's t of 3 degrees of freedom: 3.182 at 95 %.
    assert noise.exceeds(3.19, 1.0)
    assert not noise.exceeds(3.17, 1.0)
    assert Noise.of([Cell([1.0], None), Cell([], None)]) is None


def test_runs_of_other_budgets_are_refused(make_run: MakeRun) -> None:
    runs = _sweep(make_run, [5.0], [5.5])
    runs.append(make_run("long", {"trainer.max_steps": 200, "seed": 1}, {"step": 200.0}))
    with pytest.raises(ValueError, match=r"100 in 0, 1, 200 in long.*allow_different_budgets"):
        report(_layout(), runs)
    text = report(_layout(), runs, allow_different_budgets=True).markdown
    assert "**The runs are of different budgets**" in text
    assert "- trainer.max_steps is 100 in 0, 1, 200 in long\n" in text
    assert "- steps made is 100 in 0, 1, 200 in long\n" in text


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
def test_every_other_setting_is_part_of_the_budget(
    make_run: MakeRun, setting: str, value: object
) -> None:
    runs = _sweep(make_run, [5.0], [5.5])
    runs[1] = make_run("1", {"model.residual_posterior": False, setting: value})
    with pytest.raises(ValueError, match=f"more than the table compares: {setting} is"):
        report(_layout(), runs)


def test_the_number_of_images_tested_is_part_of_the_budget(make_run: MakeRun) -> None:
    absolute = make_run("1", {"model.residual_posterior": False}, {"test/num_images": 5.0})
    with pytest.raises(ValueError, match="images tested is 20 in 0, 5 in 1"):
        report(_layout(), [make_run("0"), absolute])


def test_the_device_matters_where_cost_is_compared(make_run: MakeRun) -> None:
    runs = _sweep(make_run, [5.0], [5.5])
    runs[1] = make_run("1", {"model.residual_posterior": False, "device": "a GPU"})
    assert "device: CPU (one), 1 thread or a GPU" in report(_layout(), runs).markdown
    with pytest.raises(ValueError, match="device is CPU"):
        report(_layout(compares_cost=True), runs)


def test_columns_compared_by_themselves_may_have_budgets_of_their_own(make_run: MakeRun) -> None:
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
    assert "- killed is left out: it has not been trained and tested to its end" in made.markdown
    assert "- foreign is left out: it belongs to no cell of the table" in made.markdown
    assert _row(made.markdown, "residual") == ["5.000 (1)", "3.16"]
    assert "seeds: 0\n" in made.markdown


def test_what_the_guard_did_is_named(make_run: MakeRun) -> None:
    first, second = _sweep(make_run, [5.0], [5.5])
    (test,) = first.rows
    rows = [{"step": 9.0, "train/skipped_steps": 12.0, "train/rollbacks": 1.0}, test]
    first = make_run("0", rows=[*rows])
    text = report(_layout(), [first, second]).markdown
    assert "0 was rolled back once" in text


def test_runs_that_diverged_count_where_that_is_the_question(make_run: MakeRun) -> None:
    columns = [
        {"label": "finite", "metric": "finite", "published": [None, None]},
        {"label": "NLL", "metric": "test/nll", "published": [None, None]},
    ]
    runs = _sweep(make_run, [5.0, math.inf], [5.5])
    diverged = {"seed": 8, "model.residual_posterior": False}
    runs.append(make_run("8", diverged, rows=[{"step": 3.0, "train/diverged": 1.0}]))
    text = report(_layout(columns=columns), runs).markdown
    assert _row(text, "residual") == ["0.50 ± 0.50 (2)", "–", "5.00 (1)", "–"]
    assert _row(text, "absolute") == ["0.50 ± 0.50 (2)", "–", "5.50 (1)", "–"]
    assert "8 diverged at step 4" in text
    assert "1 ended with an NLL that is not finite, which is left out" in text


def test_two_runs_of_one_cell_and_seed_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(ValueError, match="'0' and 'again' are of one cell"):
        report(_layout(), [make_run("0"), make_run("again")])


def test_runs_that_show_nothing_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(ValueError, match="none of the 1 has been trained"):
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


def test_fewer_groups_stand_for_the_papers_in_their_order(make_run: MakeRun) -> None:
    runs = [
        make_run(str(n), {"model.hierarchy.num_groups": [n]}, {"test/nll": 9.0 - n})
        for n in (4, 1)
    ]
    text = report(_by_groups(), runs).markdown
    assert "| L = 10 (here 1) | paper | L = 20 (here 4) | paper |" in text
    assert _row(text, "residual") == ["8.00 (1)", "3", "5.00 (1)", "2"]
    assert "residual: L = 20 (here 4) (2) is below L = 10 (here 1) (3) in the paper" in text
    with pytest.raises(ValueError, match="is 4, but the paper compares 2 values of it, 10, 20"):
        report(_by_groups(), runs[:1])


def test_the_papers_groups_need_not_all_be_there(make_run: MakeRun) -> None:
    run = make_run("0", {"model.hierarchy.num_groups": [20]})
    assert _row(report(_by_groups(), [run]).markdown, "residual") == ["–", "3", "5.00 (1)", "2"]


def test_other_datasets_get_a_column_of_their_own(make_run: MakeRun) -> None:
    columns = [
        {"label": "CIFAR-10", "metric": "test/nll", "published": [3.0, 2.0],
         "where": {"choices.dataset": "cifar10"}}
    ]  # fmt: skip
    others = {"axis": "columns", "setting": "choices.dataset", "metric": "test/nll"}
    text = report(_layout(columns=columns, others=others), [make_run("0")]).markdown
    assert "| CIFAR-10 | paper | image_folder | paper |" in text
    assert _row(text, "residual") == ["–", "3", "5.00 (1)", "–"]


def test_other_weights_get_a_row_of_their_own(make_run: MakeRun) -> None:
    changes = {
        "rows": [{"label": "λ = 1", "where": {"penalty.weight": 1.0}}],
        "columns": [{"label": "NLL", "metric": "test/nll", "published": [None]}],
        "varies": ["penalty.weight"],
        "others": {"axis": "rows", "setting": "penalty.weight"},
    }
    text = report(_layout(**changes), [make_run("0")]).markdown
    assert _row(text, "λ = 1") == ["–", "–"]
    assert _row(text, "0.01") == ["5.00 (1)", "–"]


def test_numbers_relative_to_a_row_are_of_its_mean(make_run: MakeRun) -> None:
    columns = [
        {"label": "memory", "metric": "test/nll", "published": [1.0, 0.6],
         "relative_to": "residual"}
    ]  # fmt: skip
    text = report(_layout(columns=columns), _sweep(make_run, [4.0, 6.0], [3.0, 3.0])).markdown
    assert _row(text, "residual") == ["1.00 ± 0.20 (2)", "1"]
    assert _row(text, "absolute") == ["0.60 ± 0.00 (2)", "0.6"]
