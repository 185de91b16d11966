"""Whether runs reproduce the order of the paper's results beyond the noise."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from scipy.special import stdtrit

from nvae_lightning.reporting.layout import Column, Layout
from nvae_lightning.reporting.run import shown

_QUANTILE = 0.975  # of a two-sided t-test at 5 %


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


#: By row and column.
Cells = Mapping[tuple[int, int], Cell]


def pooled_variance(cells: Iterable[Cell]) -> tuple[float, int]:
    """Return the variance between seeds, pooled over cells, and its degrees of freedom."""
    repeated = [cell.values for cell in cells if len(cell.values) > 1]
    degrees = sum(len(values) - 1 for values in repeated)
    squares = sum((len(values) - 1) * statistics.variance(values) for values in repeated)
    return squares / degrees if degrees else math.nan, degrees


def _compare(
    place: str, low: tuple[str, Cell], high: tuple[str, Cell], alike: list[Cell], digits: int
) -> tuple[str, str]:
    """Compare two cells of which the first is at most the second in the paper.

    Returns:
        Verdict: found, reversed, within noise or unknown; and the comparison in words.
    """
    names, first, second = (low[0], high[0]), low[1], high[1]
    is_equal = first.published == second.published
    difference = second.mean - first.mean
    amount = f"by {abs(difference):.{digits}f}"
    variance, degrees = pooled_variance(alike)
    error = math.sqrt(variance * (1 / len(first.values) + 1 / len(second.values)))
    if degrees:
        amount += f" ± {error:.{digits}f}"
    if not degrees:
        verdict, words = "unknown", "one seed, so that the noise is unknown"
    elif abs(difference) <= float(stdtrit(degrees, _QUANTILE)) * error:
        verdict, words = "within noise", "within the noise" + ", as expected" * is_equal
    elif is_equal or difference < 0:
        verdict, words = "reversed", "not equal here" if is_equal else "reversed"
    else:
        verdict, words = "found", "as in the paper"
    return verdict, (
        f"{place}: {names[0]} ({shown(first.published)}) is {'equal to' if is_equal else 'below'} "
        f"{names[1]} ({shown(second.published)}) in the paper; here {first.mean:.{digits}f} and "
        f"{second.mean:.{digits}f}, {'lower' if difference > 0 else 'higher'} {amount}: "
        f"**{words}**"
    )


def _orders(layout: Layout, cells: Cells) -> Iterator[tuple[str, str]]:
    """Compare neighbours in the paper's order: rows of a column, and columns of a row."""
    rows, columns = list(enumerate(layout.rows)), list(enumerate(layout.columns))
    lines: list[tuple[str, list[tuple[str, Cell]], int]] = []
    if "rows" in layout.orders:
        lines += [(c.label, [(r.label, cells[i, j]) for i, r in rows], j) for j, c in columns]
    if "columns" in layout.orders:
        lines += [(r.label, [(c.label, cells[i, j]) for j, c in columns], 0) for i, r in rows]
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
        for low, high in pairwise(known):
            yield _compare(place, low, high, alike, column.digits)


def _is_alike(first: Column, second: Column) -> bool:
    return first.quantity == second.quantity and first.relative_to == second.relative_to


def order_section(layout: Layout, cells: Cells) -> Iterator[str]:
    """Summarise which orders of the paper are reproduced; yield nothing if there are none."""
    orders = list(_orders(layout, cells))
    if not orders:
        return
    found = Counter(verdict for verdict, _ in orders)
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
    yield from (f"- {text}" for _, text in orders)
    yield ""
