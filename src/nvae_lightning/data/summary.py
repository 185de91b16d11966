"""Report and summary of a source: images read, converted and skipped, and files ignored.

A reason is a kind such as ``with suffix .txt``, or a kind and details after a colon. The report
gives the reasons of each file, the summary counts their kinds.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from pydantic import BaseModel

from nvae_lightning.data.messages import escaped

REPORT = "report.csv"

OUTCOMES = ("read", "converted", "skipped", "ignored")

_ALL = "all"  # counts each file once; a file may have several kinds or none
_MOST_KINDS = 8  # per line


class Outcome(NamedTuple):
    """An image that was converted, or a file that was not read.

    Args:
        split: Name of the split; empty for a file in none.
        image: Name of the image in the source.
        outcome: ``converted``, ``skipped`` (unreadable) or ``ignored`` (not an image).
        reason: Description of the conversion, or reason not to read it.
    """

    split: str
    image: str
    outcome: str
    reason: str


class Summary(BaseModel):
    """Number of files by outcome and kind.

    Args:
        counts: Number of files of each outcome, in total and by kind.
    """

    counts: dict[str, Counter[str]] = {}

    def count(self, outcome: str, *reasons: str, files: int = 1) -> None:
        """Add files to an outcome, and to the kinds of their reasons."""
        kinds = (reason.partition(": ")[0] for reason in reasons)
        self.counts.setdefault(outcome, Counter()).update(dict.fromkeys((_ALL, *kinds), files))

    def total(self, outcome: str) -> int:
        """Return the number of files of an outcome."""
        return self.counts.get(outcome, Counter())[_ALL]

    def lines(self) -> list[str]:
        """Return one line per outcome."""
        lines = []
        for outcome in OUTCOMES:
            kinds = self.counts.get(outcome, Counter()).most_common()
            if kinds:
                named = [f"{n:,} {escaped(kind)}" for kind, n in kinds if kind != _ALL]
                more = ["and more"] if len(named) > _MOST_KINDS else []
                text = ", ".join(named[:_MOST_KINDS] + more)
                lines.append(f"{self.total(outcome):,} {outcome}: {text}")
        return lines


def merged(summaries: Iterable[Summary]) -> Summary:
    """Return the sum of all counts."""
    total = Summary()
    for summary in summaries:
        for outcome, counts in summary.counts.items():
            total.counts.setdefault(outcome, Counter()).update(counts)
    return total


def left_out(files: Iterable[Outcome]) -> Summary:
    """Count files that were not read."""
    summary = Summary()
    for file in files:
        summary.count(file.outcome, file.reason)
    return summary


def to_csv(outcomes: Iterable[Outcome]) -> str:
    """Return the text of a report with one line per outcome."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([Outcome._fields, *(map(escaped, outcome) for outcome in outcomes)])
    return text.getvalue()
