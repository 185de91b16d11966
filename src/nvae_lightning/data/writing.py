"""Files of a preparation that are there whole or not at all, and the journal of a split."""

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nvae_lightning.data.chunks import BAR, Chunks, decoded, listed, skipped_in, stop_at
from nvae_lightning.data.names import escaped
from nvae_lightning.data.summary import Outcome, Summary

_HEADER_BYTES = 128  # of an .npy file; room for any count


class Writer:
    """Append the chunks of one split to its file, with a note after each."""

    def __init__(self, partial: Path, split: str) -> None:
        self.split = split
        self.data = partial / f"{split}.npy"
        self.journal = partial / f"{split}.journal"
        self.names = partial / f"{split}.txt"

    def run(
        self, chunks: Chunks, skip_errors: bool, num_workers: int
    ) -> tuple[list[Outcome], Summary]:
        """Decode what is missing; return what became of the images.

        Raises:
            ValueError: If one cannot be read and is not to be skipped, or none can be.
            OSError: If the disk is full or cannot be written to.
        """
        notes = self._notes(skip_errors)
        num_images = notes[-1]["num_images"] if notes else 0
        shape = (chunks.decoder.size, chunks.decoder.size, chunks.decoder.channels)
        self.data.touch()
        with self.data.open("r+b") as data, self.journal.open("a", encoding="utf-8") as journal:
            data.truncate(_HEADER_BYTES + num_images * math.prod(shape))
            data.seek(0, os.SEEK_END)
            remaining = decoded(chunks, len(notes), num_workers)
            options = {"initial": len(notes), "unit": "chunk", **BAR, "leave": True}
            for chunk in tqdm(remaining, f"Preparing {self.split}", len(chunks), **options):
                if not skip_errors:
                    stop_at(skipped_in(chunk.outcomes), "source: ")
                data.write(chunk.pixels.tobytes())
                _to_disk(data)
                num_images += len(chunk.pixels)
                note = {
                    "num_images": num_images,
                    "outcomes": chunk.outcomes,
                    "summary": chunk.summary.to_dict(),
                }
                journal.write(json.dumps(note) + "\n")
                _to_disk(journal)
                notes.append(note)
            data.seek(0)
            data.write(_header((num_images, *shape)))
            _to_disk(data)
        outcomes = [outcome for note in notes for outcome in note["outcomes"]]
        skipped = dict(skipped_in(outcomes))
        if num_images == 0:
            self.journal.unlink()  # so that the next call looks again
            raise ValueError(
                f"source: no image of the split '{self.split}' can be read, beginning with "
                f"{listed([*skipped.items()][:1])}; replace them"
            )
        kept = [name for name in chunks.source.names if name not in skipped]
        write(self.names, "".join(f"{escaped(name)}\n" for name in kept))
        summary = Summary()
        for note in notes:
            summary.add(Summary.from_dict(note["summary"]))
        return [Outcome(self.split, *outcome) for outcome in outcomes], summary

    def _notes(self, skip_errors: bool) -> list[dict[str, Any]]:
        """Read the journal, and cut off for good what cannot be gone on from.

        That is a last line without an end and, unless errors are skipped, all from the first
        skipped image on: it may have been replaced.
        """
        if not self.journal.exists():
            return []
        notes = []
        size = 0
        for line in self.journal.read_bytes().splitlines(keepends=True):
            note = json.loads(line) if line.endswith(b"\n") else None
            if note is None or (skipped_in(note["outcomes"]) and not skip_errors):
                break
            notes.append(note)
            size += len(line)
        os.truncate(self.journal, size)
        return notes


def _header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    assert len(buffer.getvalue()) == _HEADER_BYTES
    return buffer.getvalue()


def write(path: Path, text: str) -> None:
    """Write a text so that it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)
        _to_disk(file)
    temporary.replace(path)


def _to_disk(file: Any) -> None:  # noqa: ANN401 -- any open file
    file.flush()
    os.fsync(file.fileno())
