"""Whether runs reproduce the order of the paper's results beyond the noise."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from scipy.special import stdtrit

from nvae_lightning.reporting.layout import Column, Layout
from nvae_lightning.reporting.run import shown

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cell:
    """Measured values, one per run, and the paper's value."""

    values: Sequence[float]
    published: int | float | None

    @property
    def mean(self) -> float:
        """Mean over the runs; NaN if there are none."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; NaN for fewer than two runs."""
        count = len(self.values)
        return statistics.stdev(self.values) / math.sqrt(count) if count > 1 else math.nan

    def show(self, digits: int) -> str:
        """Format mean, standard error and number of runs."""
        if not self.values:
            return "–"
        if len(self.values) == 1:
            return f"{self.mean:.{digits}f} (1)"
        error = f" ± {self.standard_error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error} ({len(self.values)})"


@dataclass(frozen=True)
class Noise:
    """Variance between runs that differ only in their seed, assumed equal in all cells.

    Args:
        variance: Variance pooled over the cells.
        degrees: Its degrees of freedom.
    """

    variance: float
    degrees: int

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> Noise | None:
        """Pool the variances of cells; None if no cell has two runs."""
        degrees = sum(max(len(cell.values) - 1, 0) for cell in cells)
        if degrees == 0:
            return None
        squares = [
            (len(cell.values) - 1) * statistics.variance(cell.values)
            for cell in cells
            if len(cell.values) > 1
        ]
        return cls(sum(squares) / degrees, degrees)

    def of_difference(self, first: Cell, second: Cell) -> float:
        """Return the standard error of the difference of two cells' means."""
        counts = len(first.values), len(second.values)
        return math.sqrt(self.variance * sum(1 / count for count in counts))

    def exceeds(self, difference: float, error: float) -> bool:
        """Whether a difference exceeds the noise: Student's t-test at 5 %, two-sided."""
        return abs(difference) > float(stdtrit(self.degrees, 0.5 + _CONFIDENCE / 2)) * error


@dataclass(frozen=True)
class Order:
    """Two neighbours in the paper's order.

    Args:
        verdict: Whether the runs have the same order.
        text: Numbers and verdict.
    """

    verdict: Literal["found", "reversed", "within noise", "unknown"]
    text: str


def _compare(
    place: str, first: tuple[str, Cell], second: tuple[str, Cell], noise: Noise | None, digits: int
) -> Order:
    """Compare two cells of which the first is at most the second in the paper."""
    (low_label, low), (high_label, high) = first, second
    equal = low.published == high.published
    difference = high.mean - low.mean
    verdict = "unknown"
    amount = f"by {abs(difference):.{digits}f}"
    if noise is not None:
        error = noise.of_difference(low, high)
        amount += f" ± {error:.{digits}f}"
        is_more = noise.exceeds(difference, error)
        if not is_more:
            verdict = "within noise"
        elif not equal and difference > 0:
            verdict = "found"
        else:
            verdict = "reversed"
    words = {
        "found": "as in the paper",
        "reversed": "not equal here" if equal else "reversed",
        "within noise": "within the noise, as expected" if equal else "within the noise",
        "unknown": "one seed, so that the noise is unknown",
    }
    relation = "equal to" if equal else "below"
    direction = "lower" if difference > 0 else "higher"
    return Order(
        verdict,
        f"{place}: {low_label} ({shown(low.published)}) is {relation} {high_label} "
        f"({shown(high.published)}) in the paper; here {low.mean:.{digits}f} and "
        f"{high.mean:.{digits}f}, {direction} {amount}: **{words[verdict]}**",
    )


#: By row and column.
Cells = Mapping[tuple[int, int], Cell]


def orders_of(layout: Layout, cells: Cells) -> Iterator[Order]:
    """Compare neighbours in the paper's order: rows of a column, and columns of a row."""
    lines: list[tuple[str, list[tuple[str, Cell]], int]] = []
    rows, columns = enumerate(layout.rows), list(enumerate(layout.columns))
    if "rows" in layout.orders:
        for j, column in columns:
            entries = [(row.label, cells[i, j]) for i, row in enumerate(layout.rows)]
            lines.append((column.label, entries, j))
    if "columns" in layout.orders:
        for i, row in rows:
            lines.append((row.label, [(c.label, cells[i, j]) for j, c in columns], 0))
    for place, entries, j in lines:
        column = layout.columns[j]
        # Cells of the same quantity share their noise, also across columns.
        alike = [
            cell
            for (_, k), cell in cells.items()
            if k == j or (layout.compared == "all" and _is_alike(layout.columns[k], column))
        ]
        known = [entry for entry in entries if entry[1].published is not None and entry[1].values]
        known.sort(key=lambda entry: entry[1].published or 0.0)
        for first, second in pairwise(known):
            yield _compare(place, first, second, Noise.of(alike), column.digits)


def _is_alike(first: Column, second: Column) -> bool:
    return first.quantity == second.quantity and first.relative_to == second.relative_to


def order_section(orders: Iterable[Order]) -> Iterator[str]:
    """Summarise which orders of the paper are reproduced; yield nothing if there are none."""
    orders = list(orders)
    if not orders:
        return
    found = Counter(order.verdict for order in orders)
    unknown = f", {found['unknown']} with one seed" if found["unknown"] else ""
    yield "## The paper's order"
    yield ""
    yield (
        f"Pairs of neighbours in the paper's order: {found['found']} as in the paper, "
        f"{found['reversed']} reversed, {found['within noise']} within the noise"
        f"{unknown}, of {len(orders)}. The noise is estimated by a t-test at 5 % with the "
        "variance between seeds pooled over the cells of a quantity."
    )
    yield ""
    yield from (f"- {order.text}" for order in orders)
    yield ""
