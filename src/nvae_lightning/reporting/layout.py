"""Tables of the paper as data: rows, columns, published values, and the runs of each cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nvae_lightning.reporting.run import Quantity, Run, listed, shown

Conditions = Sequence[Mapping[str, object]]
Axis = Literal["rows", "columns"]


@dataclass(frozen=True)
class Row:
    """A row of a table, for the runs that match one of the conditions."""

    label: str
    where: Conditions


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        label: Header.
        quantity: Quantity computed from each run.
        published: The paper's values, by row.
        where: Conditions on the runs.
        digits: Number of decimals of measured values.
        relative_to: Row whose mean is the unit of the column.
    """

    label: str
    quantity: Quantity
    published: Sequence[int | float | None]
    where: Conditions = ({},)
    digits: int = 2
    relative_to: str | None = None

    @property
    def is_published(self) -> bool:
        """Whether the paper has a value for any row."""
        return any(value is not None for value in self.published)


@dataclass(frozen=True)
class Layout:
    """A table of the paper: a file of ``tables/``.

    Args:
        title: Title.
        source: Source of the paper's values.
        paper_budget: Budget of the paper's runs.
        rows: Rows.
        columns: Columns.
        varies: Settings, or groups of settings, that the table compares.
        compared: Whether all cells are compared with each other, or only those of a row or column.
        orders: Axes along which the paper's order is checked.
        compares_cost: Whether the table compares time or memory, which depend on the device.
        scaled: Setting of the columns that smaller runs may scale down, in the same order.
        others: Axis that gets a new entry for each further value of a setting.
        notes: Remarks for the reader.
    """

    title: str
    source: str
    paper_budget: str
    rows: Sequence[Row]
    columns: Sequence[Column]
    varies: Sequence[str] = ()
    compared: Literal["all", "rows", "columns"] = "all"
    orders: Sequence[Axis] = ()
    compares_cost: bool = False
    scaled: str | None = None
    others: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()


def as_layout(values: Mapping[str, Any]) -> Layout:
    """Build a layout from the values of its file."""
    rows = [Row(row["label"], _conditions(row["where"])) for row in values["rows"]]
    columns = [_as_column(column) for column in values["columns"]]
    assert all(len(column.published) == len(rows) for column in columns), values["title"]
    return Layout(**{**values, "rows": rows, "columns": columns})


def _as_column(values: Mapping[str, Any]) -> Column:
    own = {"label", "published", "digits", "relative_to"}
    return Column(
        **{key: value for key, value in values.items() if key in own},
        where=_conditions(values.get("where", {})),
        quantity=Quantity(**{k: v for k, v in values.items() if k not in {*own, "where"}}),
    )


def _conditions(where: Mapping[str, object] | Conditions) -> Conditions:
    return [where] if isinstance(where, Mapping) else where


def fitted(layout: Layout, runs: Sequence[Run]) -> Layout:
    """Adapt the columns or rows of a layout to runs that were scaled down.

    Raises:
        ValueError: If the runs have more or fewer values of the scaled setting than the paper.
    """
    if layout.scaled is not None:
        layout = _rescaled(layout, layout.scaled, runs)
    if layout.others is not None:
        layout = _with_others(layout, **layout.others, runs=runs)
    return layout


def _rescaled(layout: Layout, setting: str, runs: Sequence[Run]) -> Layout:
    published = [column.where[0][setting] for column in layout.columns]
    found = [run.setting(setting) for run in runs]
    distinct = sorted(value for i, value in enumerate(found) if value not in found[:i])
    if all(value in published for value in distinct):
        return layout
    if len(distinct) != len(published):
        raise ValueError(
            f"runs: {setting} is {listed(distinct)}, but the paper compares {len(published)} "
            f"values, {listed(published)}; run as many, in the same order"
        )
    columns = [
        dataclasses.replace(
            column,
            label=f"{column.label} (here {shown(value)})",
            where=[{setting: value}],
        )
        for column, value in zip(layout.columns, distinct, strict=True)
    ]
    return dataclasses.replace(layout, columns=columns)


def _with_others(
    layout: Layout, *, axis: Axis, setting: str, runs: Sequence[Run], **column: Any
) -> Layout:
    entries = layout.rows if axis == "rows" else layout.columns
    new = []
    for run in runs:
        if not any(run.fits(entry.where) for entry in entries) and run.setting(setting) not in new:
            new.append(run.setting(setting))
    if axis == "rows":
        rows = [*layout.rows, *(Row(str(value), [{setting: value}]) for value in new)]
        columns = [
            dataclasses.replace(column, published=[*column.published, *[None] * len(new)])
            for column in layout.columns
        ]
        return dataclasses.replace(layout, rows=rows, columns=columns)
    columns = [
        _as_column(
            {
                **column,
                "label": str(value),
                "where": {setting: value},
                "published": [None] * len(layout.rows),
            }
        )
        for value in new
    ]
    return dataclasses.replace(layout, columns=[*layout.columns, *columns])
