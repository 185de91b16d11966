"""Preparation of a source on all cores, resumable after an interruption.

One process writes, in order, to ``.partial/`` in the target, and notes its position in a journal
after every chunk of images. The next call truncates what follows the last note and resumes there.
When all splits are complete they are moved to their places.
"""

import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from nvae_lightning.data import chunks
from nvae_lightning.data.chunks import BAR, Chunks, decoded, skipped_in, stop_at
from nvae_lightning.data.decode import Decoder
from nvae_lightning.data.messages import escaped, printable
from nvae_lightning.data.readers import SPLITS, Splits
from nvae_lightning.data.storage import (
    Prepared,
    checksum,
    is_ours,
    is_prepared,
    open_prepared,
    verify,
)
from nvae_lightning.data.summary import REPORT, Outcome, Summary, left_out, merged, to_csv
from nvae_lightning.utilities.files import whole_file

PARTIAL = ".partial"

_SUFFIXES = (".npy", ".txt", ".json")  # of a split's files; the last marks it as complete
_HEADER_BYTES = 128  # of an .npy file; room for any count


def prepare(
    splits: Splits,
    decoder: Decoder,
    folder: Path,
    *,
    source: str,
    settings: Mapping[str, Any],
    skip_errors: bool = False,
    overwrite: bool = False,
    num_workers: int | None = 0,
) -> dict[str, Prepared]:
    """Write the images of a source to a folder, or resume an interrupted preparation.

    Args:
        splits: Images of the source.
        decoder: Conversion of each image.
        folder: Target folder, created if it does not exist.
        source: Name of the source, for the record.
        settings: Settings that determine the images, for the record.
        skip_errors: Whether to leave out unreadable images, instead of stopping at the first.
        overwrite: Whether to replace the files of another preparation.
        num_workers: Number of processes that decode; 0 stands for this one, None for one per core.

    Raises:
        ValueError: If an image is unreadable, the folder holds something else, is being prepared
            by another process, or is not writable. The same call then resumes.
    """
    work = _Preparation(splits, decoder, folder, source, settings)
    is_begun = work.is_begun
    is_done = is_prepared(folder) and not overwrite and not is_begun
    if is_done:
        work.check_same(skip_errors)
    elif not overwrite and not is_begun:
        work.check_vacant()
    if not is_done or work.partial.exists():
        with _locked(work.partial):
            if not is_done:
                work.start()
                work.write(skip_errors, num_workers)
                work.publish()
            shutil.rmtree(work.partial, ignore_errors=True)
    return open_prepared(folder)


@dataclass(frozen=True)
class _Preparation:
    """The steps of one preparation; see `prepare` for the fields."""

    splits: Splits
    decoder: Decoder
    folder: Path
    source: str
    settings: Mapping[str, Any]

    @property
    def partial(self) -> Path:
        """The folder of unfinished files."""
        return self.folder / PARTIAL

    @property
    def plan(self) -> str:
        """Hash of all settings and inputs that determine the result."""
        everything = (self.source, self.splits.format, self.decoder, sorted(self.settings.items()))
        digest = hashlib.sha256(repr((*everything, chunks.CHUNK_BYTES)).encode())
        for name, images in self.splits.sources.items():
            digest.update(repr((name, len(images))).encode())
            for image in images.names:
                digest.update(image.encode(errors="surrogateescape") + b"\n")
        return digest.hexdigest()

    @property
    def is_begun(self) -> bool:
        """Whether an interrupted preparation had the same plan."""
        try:
            return (self.partial / "plan").read_text(encoding="utf-8") == self.plan
        except OSError:
            return False

    def check_same(self, skip_errors: bool) -> None:
        """Check that the prepared images are intact and were made the same way."""
        prepared = open_prepared(self.folder)
        known = next(iter(prepared.values()))
        found = {"source": known.source, **known.settings}
        wanted = {"source": self.source, **self.settings}
        for split, known in prepared.items():
            found[f"{split} images"] = known.num_images + known.num_skipped
        for split, images in self.splits.sources.items():
            wanted[f"{split} images"] = len(images)
        for name in found | wanted:
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"dataset.root: '{self.folder}' holds images that were prepared with {name}="
                    f"{found.get(name)}, not {wanted.get(name)}; set another dataset.root=FOLDER, "
                    "or overwrite=true"
                )
        verify(self.folder, prepared)
        num_skipped = sum(known.num_skipped for known in prepared.values())
        if num_skipped and not skip_errors:
            raise ValueError(
                f"dataset.root: '{self.folder}' was prepared without {num_skipped} of the images, "
                f"which {REPORT} names; accept that with on_error=skip, or replace or remove them "
                "and set overwrite=true"
            )

    def check_vacant(self) -> None:
        """Check that no file would be overwritten."""
        names = [f"{split}{suffix}" for split in self.splits.sources for suffix in _SUFFIXES]
        taken = [name for name in (*names, REPORT) if os.path.lexists(self.folder / name)]
        if taken:
            raise ValueError(
                f"dataset.root: '{self.folder}' holds {', '.join(taken)} already, not as a whole "
                "preparation; set another dataset.root=FOLDER, or overwrite=true to replace them"
            )

    def start(self) -> None:
        """Delete unfinished files, unless they have the same plan."""
        if not self.is_begun:
            (self.partial / "plan").unlink(missing_ok=True)  # first: the rest may now be deleted
            for path in self.partial.iterdir():
                if path.name != "lock":
                    path.unlink()
            _write(self.partial / "plan", self.plan)

    def write(self, skip_errors: bool, num_workers: int | None) -> None:
        """Write all files of all splits to the partial folder."""
        report: list[Outcome] = []
        beside = left_out(self.splits.left_out)  # counted once, with the first split
        for name, images in self.splits.sources.items():
            split = Chunks(images, self.decoder)
            num_images, outcomes, summary = _write_split(
                self.partial, name, split, skip_errors, num_workers
            )
            report += outcomes
            known = Prepared(
                split=name,  # pyright: ignore[reportArgumentType]
                splits=list(self.splits.sources),  # pyright: ignore[reportArgumentType]
                num_images=num_images,
                shape=(num_images, *split.shape),
                sha256=checksum(self.partial / f"{name}.npy", f"Verifying {name}"),
                source=self.source,
                format=self.splits.format,
                settings=dict(self.settings),
                num_skipped=summary.total("skipped"),
                summary=merged([summary, beside]),
            )
            _write(self.partial / f"{name}.json", known.model_dump_json(indent=2))
            beside = Summary()
        _write(self.partial / REPORT, to_csv([*report, *self.splits.left_out]))

    def publish(self) -> None:
        """Move everything to its place, the descriptions last."""
        for path in self.partial.glob("*.journal"):  # an array that was moved cannot be resumed
            path.unlink()
        for split in SPLITS:
            if is_ours(self.folder / f"{split}.json"):
                for suffix in _SUFFIXES:
                    (self.folder / f"{split}{suffix}").unlink(missing_ok=True)
        for suffix in (".csv", *_SUFFIXES):
            for path in self.partial.glob(f"*{suffix}"):
                path.replace(self.folder / path.name)
        (self.partial / "plan").unlink()


def _write_split(
    partial: Path, split: str, chunks: Chunks, skip_errors: bool, num_workers: int | None
) -> tuple[int, list[Outcome], Summary]:
    """Append the remaining chunks of a split to its file, with a note in the journal after each.

    Returns:
        Number of images, outcomes for the report, and summary.

    Raises:
        ValueError: If an image is unreadable and must not be skipped, or all are unreadable.
        OSError: If the disk is full or not writable.
    """
    path = partial / f"{split}.npy"
    journal_path = partial / f"{split}.journal"
    notes = _read_journal(journal_path, skip_errors)
    num_images = notes[-1]["num_images"] if notes else 0
    path.touch()
    with path.open("r+b") as data, journal_path.open("a", encoding="utf-8") as journal:
        data.truncate(_HEADER_BYTES + num_images * math.prod(chunks.shape))
        data.seek(0, os.SEEK_END)
        remaining = decoded(chunks, len(notes), num_workers)
        options = {"initial": len(notes), "unit": "chunk", **BAR, "leave": True}
        for chunk in tqdm(remaining, f"Preparing {split}", len(chunks), **options):
            if not skip_errors:
                stop_at(skipped_in(chunk.outcomes), "source: ")
            data.write(chunk.pixels.tobytes())
            _to_disk(data)
            num_images += len(chunk.pixels)
            counts = chunk.summary.counts
            note = {"num_images": num_images, "outcomes": chunk.outcomes, "counts": counts}
            journal.write(json.dumps(note) + "\n")
            _to_disk(journal)
            notes.append(note)
        data.seek(0)
        data.write(_header((num_images, *chunks.shape)))
        _to_disk(data)
    outcomes = [outcome for note in notes for outcome in note["outcomes"]]
    skipped = skipped_in(outcomes)
    if num_images == 0:
        journal_path.unlink()  # the next call reads the images again
        name, reason = next(iter(skipped.items()))
        raise ValueError(
            f"source: no image of the split '{split}' is readable, the first being "
            f"'{printable(name)}' ({reason}); replace them"
        )
    kept = [name for name in chunks.source.names if name not in skipped]
    _write(partial / f"{split}.txt", "".join(f"{escaped(name)}\n" for name in kept))
    summary = merged(Summary(counts=note["counts"]) for note in notes)
    return num_images, [Outcome(split, *outcome) for outcome in outcomes], summary


def _read_journal(path: Path, skip_errors: bool) -> list[dict[str, Any]]:
    """Read the notes to resume from, and truncate the rest.

    The rest is an unfinished last line and, unless errors are skipped, all from the first skipped
    image on, which may have been replaced.
    """
    if not path.exists():
        return []
    notes = []
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        note = json.loads(line) if line.endswith(b"\n") else None
        if note is None or (skipped_in(note["outcomes"]) and not skip_errors):
            break
        notes.append(note)
        size += len(line)
    os.truncate(path, size)
    return notes


def _header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    assert len(buffer.getvalue()) == _HEADER_BYTES
    return buffer.getvalue()


def _write(path: Path, text: str) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(text.encode("utf-8", "surrogateescape"))
        _to_disk(file)


def _to_disk(file: Any) -> None:  # noqa: ANN401 -- any open file
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Lock the partial folder, and explain errors of the system."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        # The workers of a killed process may hold the lock for a moment.
        with FileLock(partial / "lock", timeout=1):
            yield
    except Timeout as error:
        raise ValueError(
            f"dataset.root: '{partial.parent}' is being prepared by another process; "
            "wait for it, or give another dataset.root=FOLDER"
        ) from error
    except OSError as error:
        raise ValueError(
            f"dataset.root: cannot write to '{partial.parent}' ({error.strerror or error}); make "
            "room and give the same command again, or give another dataset.root=FOLDER"
        ) from error
