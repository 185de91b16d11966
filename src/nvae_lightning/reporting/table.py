"""A table of the paper with measured values, as Markdown and as numbers to plot."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nvae_lightning.reporting.budget import budget, describe, differences
from nvae_lightning.reporting.layout import Layout, fitted
from nvae_lightning.reporting.order import Cell, Cells, order_section
from nvae_lightning.reporting.run import Quantity, Run, shown
from nvae_lightning.utilities.figures import Comparison

Members = Mapping[tuple[int, int], Sequence[Run]]


@dataclass(frozen=True)
class Report:
    """A table of the paper with measured values.

    Args:
        markdown: Report.
        comparisons: Its numbers, to plot.
    """

    markdown: str
    comparisons: Sequence[Comparison]


def report(
    layout: Layout, runs: Sequence[Run], *, allow_different_budgets: bool = False
) -> Report:
    """Compare runs with a table of the paper.

    Args:
        layout: Table.
        runs: Runs of a sweep.
        allow_different_budgets: Whether runs may differ in more than the table compares.

    Raises:
        ValueError: If no run belongs to the table or has finished, if two have the same cell and
            seed, or if runs differ in more than the table compares.
    """
    ended = [run for run in runs if run.has_ended]
    if not ended:
        raise ValueError(
            f"runs: none of the {len(runs)} has finished its training and test; resume them, or "
            "choose others"
        )
    layout = fitted(layout, ended)
    members = _members(layout, ended)
    groups = _compared(layout, members)
    different = {
        name: found for name, group in groups.items() if (found := differences(group, layout))
    }
    if different and not allow_different_budgets:
        found = [describe(*item) for found in different.values() for item in found.items()]
        rest = f"; and {len(found) - 5} more settings" if len(found) > 5 else ""
        raise ValueError(
            f"runs: they differ in more than the table compares: {'; '.join(found[:5])}{rest}; "
            "leave some of them out, or set allow_different_budgets=true"
        )
    cells = _cells(layout, members)
    lines = [f"# {layout.title}", ""]
    if different:
        lines += ["**The runs have different budgets**, listed below: compare with care.", ""]
    lines += [*_table(layout, cells), "", "Measured: mean ± standard error over seeds "]
    lines[-1] += f"(number of runs). Paper: {layout.source}."
    lines += [*layout.notes, "", *order_section(layout, cells)]
    lines += ["## Budget", "", f"- The paper's: {layout.paper_budget}."]
    for name, group in groups.items():
        lines += [f"- Here{name}:", *(f"  - {line}" for line in budget(group))]
    lines += ["", "Absolute values are comparable only under equal budgets.", ""]
    for name, found in different.items():
        lines += [f"## Differences{name}", ""]
        lines += [*(f"- {describe(*item)}" for item in found.items()), ""]
    lines += _remarks(runs, [run for group in groups.values() for run in group])
    return Report("\n".join(lines).rstrip() + "\n", list(_comparisons(layout, cells)))


def _members(layout: Layout, runs: Sequence[Run]) -> Members:
    """Find the runs of each cell, by row and column."""
    members = {
        (i, j): [run for run in runs if run.fits(row.where) and run.fits(column.where)]
        for i, row in enumerate(layout.rows)
        for j, column in enumerate(layout.columns)
    }
    if not any(members.values()):
        raise ValueError(
            f"runs: none of the {len(runs)} has the settings of a row and a column of "
            f"'{layout.title}'; run the experiment of that name"
        )
    for cell in members.values():
        names: dict[object, str] = {}
        for run in cell:
            seed = run.setting("seed")
            if seed in names:
                raise ValueError(
                    f"runs: '{names[seed]}' and '{run.name}' have the same cell of the table and "
                    f"the same seed, {seed}; leave one of them out"
                )
            names[seed] = run.name
    return members


def _compared(layout: Layout, members: Members) -> dict[str, list[Run]]:
    """Group the runs that are compared with each other, by name."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for (i, j), cell in members.items():
        name = {
            "all": "",
            "rows": f", {layout.rows[i].label}",
            "columns": f", {layout.columns[j].label}",
        }[layout.compared]
        groups[name] += [run for run in cell if run not in groups[name]]
    return {name: group for name, group in groups.items() if group}


def _cells(layout: Layout, members: Members) -> dict[tuple[int, int], Cell]:
    cells = {}
    for (i, j), runs in members.items():
        column = layout.columns[j]
        found = [run.value(column.quantity) for run in runs]
        values = [value for value in found if value is not None and math.isfinite(value)]
        cells[i, j] = Cell(values, column.published[i])
    for j, column in enumerate(layout.columns):
        if column.relative_to is None:
            continue
        unit = cells[[row.label for row in layout.rows].index(column.relative_to), j].mean
        for i in range(len(layout.rows)):
            values = [] if math.isnan(unit) else [value / unit for value in cells[i, j].values]
            cells[i, j] = dataclasses.replace(cells[i, j], values=values)
    return cells


def _table(layout: Layout, cells: Cells) -> Iterator[str]:
    """Yield the lines of the table, with the paper's values beside those that it has."""
    header = [""]
    for column in layout.columns:
        header += [column.label, "paper"] if column.is_published else [column.label]
    yield f"| {' | '.join(header)} |"
    yield f"|---|{'---:|' * (len(header) - 1)}"
    for i, row in enumerate(layout.rows):
        entries = [row.label]
        for j, column in enumerate(layout.columns):
            cell = cells[i, j]
            entries.append(cell.show(column.digits))
            if column.is_published:
                entries.append(shown(cell.published))
        yield f"| {' | '.join(entries)} |"


def _remarks(runs: Sequence[Run], of_table: Sequence[Run]) -> Iterator[str]:
    """Name runs that are left out or whose budget the guard changed."""
    remarks = [
        f"{run.name} is left out: its training or test has not finished"
        for run in runs
        if not run.has_ended
    ]
    remarks += [
        f"{run.name} is left out: it matches no cell of the table"
        for run in runs
        if run.has_ended and run not in of_table
    ]
    for run in of_table:
        if run.has_diverged:
            remarks.append(f"{run.name} diverged at step {run.num_steps}")
        elif not run.is_finite:
            remarks.append(f"{run.name} has a non-finite NLL, which is left out")
        rollbacks = run.value(Quantity("train/rollbacks"))
        skipped = run.value(Quantity("train/skipped_steps"))
        if rollbacks:
            times = "once" if rollbacks == 1 else f"{rollbacks:.0f} times"
            remarks.append(
                f"{run.name} was rolled back {times}, with λ raised and the learning rate lowered"
            )
        elif skipped:
            remarks.append(f"{run.name} skipped {skipped:.0f} non-finite steps")
    if remarks:
        yield "## Remarks"
        yield ""
        yield from (f"- {remark}" for remark in remarks)


def _comparisons(layout: Layout, cells: Cells) -> Iterator[Comparison]:
    """Yield a panel for each column with measured values."""
    labels = [row.label for row in layout.rows]
    for j, column in enumerate(layout.columns):
        found = [cells[i, j] for i in range(len(labels))]
        if any(cell.values for cell in found):
            published = [math.nan if cell.published is None else cell.published for cell in found]
            means = [cell.mean for cell in found]
            errors = [cell.standard_error for cell in found]
            yield Comparison(column.label, labels, means, errors, published)
