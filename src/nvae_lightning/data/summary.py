"""What became of the images of a source: counted by kind, and listed one by one."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nvae_lightning.data.eight_bits import NEARLY_BLACK, Note
from nvae_lightning.data.names import escaped, unescaped

REPORT = "report.csv"

OUTCOMES = ("read", "converted", "skipped", "ignored")

_ALL = "all"  # files of an outcome; those of its kinds may be more, or the same twice
_MOST_KINDS = 8  # that a line names


@dataclass(frozen=True)
class Outcome:
    """An image that could not be taken as it is, or a file that was not taken.

    Args:
        split: Its split; empty for a file that is in none.
        image: Its name in the source.
        outcome: ``converted``, ``skipped`` (it could not be read) or ``ignored`` (it is no image).
        reason: What was done to it, or why it was left out.
    """

    split: str
    image: str
    outcome: str
    reason: str


@dataclass
class Summary:
    """Files by what became of them.

    Args:
        counts: For each outcome its number of files, and of each kind.
        largest: Largest value of all images with 16 bits; None if there were none.
    """

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    largest: int | None = None

    def count(self, outcome: str, *kinds: str, files: int = 1) -> None:
        """Add some files to an outcome, and to the kinds of it that they are."""
        self.counts.setdefault(outcome, Counter()).update(dict.fromkeys((_ALL, *kinds), files))

    def note(self, notes: Iterable[Note]) -> None:
        """Add an image that was converted."""
        notes = list(notes)
        self.count("converted", *(note.kind for note in notes))
        for note in notes:
            if note.largest is not None:
                self.largest = max(note.largest, self.largest or 0)

    def add(self, other: "Summary") -> None:
        """Add what another summary counts."""
        for outcome, counts in other.counts.items():
            self.counts.setdefault(outcome, Counter()).update(counts)
        if other.largest is not None:
            self.largest = max(other.largest, self.largest or 0)

    def lines(self) -> list[str]:
        """Return a line for each outcome, and advice where all images are nearly black."""
        lines = []
        for outcome in OUTCOMES:
            kinds = self.counts.get(outcome, Counter()).most_common()
            if kinds:
                named = [f"{n:,} {escaped(kind)}" for kind, n in kinds if kind != _ALL]
                more = ["and more"] if len(named) > _MOST_KINDS else []
                number = self.counts[outcome][_ALL]
                lines.append(f"{number:,} {outcome}: {', '.join(named[:_MOST_KINDS] + more)}")
        if self.largest is not None and self.largest < NEARLY_BLACK:
            bits = max(8, self.largest.bit_length())
            lines.append(
                f"the values of all 16-bit images only reach {self.largest:,} of 65,535, which is "
                f"nearly black: if {bits} bits are their range, set dataset.source_bits={bits}"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain containers."""
        return {"counts": {k: dict(v) for k, v in self.counts.items()}, "largest": self.largest}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Summary":
        """Return what `to_dict` was made from."""
        counts = {str(k): Counter(v) for k, v in content.get("counts", {}).items()}
        return cls(counts, content.get("largest"))


def left_out(files: Iterable[Outcome]) -> Summary:
    """Count the files that were not taken, whose reasons are their kinds."""
    summary = Summary()
    for file in files:
        summary.count(file.outcome, file.reason)
    return summary


def to_csv(outcomes: Iterable[Outcome]) -> str:
    """Return the text of a report, a line each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["split", "image", "outcome", "reason"], lineterminator="\n")
    writer.writeheader()
    for outcome in outcomes:
        row = asdict(outcome)
        writer.writerow({name: escaped(value) for name, value in row.items()})
    return text.getvalue()


def from_csv(text: str) -> list[Outcome]:
    """Return what `to_csv` was given.

    Raises:
        ValueError: If it is something else.
    """
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""))
        return [Outcome(**{name: unescaped(row[name]) for name in row}) for row in rows]
    except (csv.Error, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
