"""Summary and report of the images of a source: read, converted, skipped and ignored."""

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

_ALL = "all"  # counts each file once; a file may be of several kinds, or none
_MOST_KINDS = 8  # per line


@dataclass(frozen=True)
class Outcome:
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


@dataclass
class Summary:
    """Number of files by outcome and kind.

    Args:
        counts: Number of files of each outcome, in all and of each kind.
        largest: Largest value in all 16-bit images; None if there were none.
    """

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    largest: int | None = None

    def count(self, outcome: str, *kinds: str, files: int = 1) -> None:
        """Add files to an outcome, and to some of its kinds."""
        self.counts.setdefault(outcome, Counter()).update(dict.fromkeys((_ALL, *kinds), files))

    def total(self, outcome: str) -> int:
        """Return the number of files of an outcome."""
        return self.counts.get(outcome, Counter())[_ALL]

    def note(self, notes: Iterable[Note]) -> None:
        """Add a converted image."""
        notes = list(notes)
        self.count("converted", *(note.kind for note in notes))
        for note in notes:
            if note.largest is not None:
                self.largest = max(note.largest, self.largest or 0)

    def add(self, other: "Summary") -> None:
        """Add the counts of another summary."""
        for outcome, counts in other.counts.items():
            self.counts.setdefault(outcome, Counter()).update(counts)
        if other.largest is not None:
            self.largest = max(other.largest, self.largest or 0)

    def lines(self) -> list[str]:
        """Return one line per outcome, and advice if all 16-bit images are nearly black."""
        lines = []
        for outcome in OUTCOMES:
            kinds = self.counts.get(outcome, Counter()).most_common()
            if kinds:
                named = [f"{n:,} {escaped(kind)}" for kind, n in kinds if kind != _ALL]
                more = ["and more"] if len(named) > _MOST_KINDS else []
                text = ", ".join(named[:_MOST_KINDS] + more)
                lines.append(f"{self.total(outcome):,} {outcome}: {text}")
        if self.largest is not None and self.largest < NEARLY_BLACK:
            bits = max(8, self.largest.bit_length())
            lines.append(
                f"the values of all 16-bit images only reach {self.largest:,} of 65,535, which is "
                f"nearly black: if {bits} bits are their range, set dataset.source_bits={bits}"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain containers."""
        return {"counts": {k: dict(v) for k, v in self.counts.items()}, "largest": self.largest}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Summary":
        """Invert `to_dict`."""
        counts = {str(k): Counter(v) for k, v in content.get("counts", {}).items()}
        return cls(counts, content.get("largest"))


def left_out(files: Iterable[Outcome]) -> Summary:
    """Count files that were not read; their kinds are the reasons."""
    summary = Summary()
    for file in files:
        summary.count(file.outcome, file.reason)
    return summary


def to_csv(outcomes: Iterable[Outcome]) -> str:
    """Return the text of a report with one line per outcome."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["split", "image", "outcome", "reason"], lineterminator="\n")
    writer.writeheader()
    for outcome in outcomes:
        row = asdict(outcome)
        writer.writerow({name: escaped(value) for name, value in row.items()})
    return text.getvalue()


def from_csv(text: str) -> list[Outcome]:
    """Invert `to_csv`.

    Raises:
        ValueError: If the text is not a report.
    """
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""))
        return [Outcome(**{name: unescaped(row[name]) for name in row}) for row in rows]
    except (csv.Error, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
