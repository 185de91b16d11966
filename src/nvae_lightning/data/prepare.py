"""From a source to prepared images, by all cores, in steps that survive an interruption.

One process writes, in order, to ``.partial/`` in the target; after every chunk of images it notes
in a journal how far it came. A new start cuts off what came after the last note and goes on from
there. When all splits are complete they are moved to their places at once.
"""

import csv
import hashlib
import io
import json
import math
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import UInt8
from PIL import UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nvae_lightning.data.decode import Decoder
from nvae_lightning.data.sources import SPLITS, ArraySource, Source, Splits
from nvae_lightning.data.storage import (
    LAYOUT,
    Prepared,
    checksum,
    damaged,
    is_ours,
    is_prepared,
    open_prepared,
    verify,
)

PARTIAL = ".partial"
REPORT = "report.csv"

_CHUNK_BYTES = 1 << 22
_HEADER_BYTES = 128  # of an .npy file; room for any count
_SUFFIXES = (".npy", ".txt", ".json")  # of a split's files; the last says that they are there


@dataclass(frozen=True)
class Outcome:
    """An image that could not be taken as it is.

    Args:
        split: Its split.
        image: Its name in the source.
        outcome: ``converted`` or ``skipped``.
        reason: What was done to it, or why it could not be read.
    """

    split: str
    image: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class Chunk:
    """Some images of a split, decoded.

    Args:
        pixels: The images that could be read.
        outcomes: Name, outcome and reason for each that is worth a report.
    """

    pixels: UInt8[np.ndarray, "count height width channel"]
    outcomes: list[tuple[str, str, str]]


class Chunks(Dataset[Chunk]):
    """A split as chunks of some 4 MB, decoded where they are asked for.

    Args:
        source: The split.
        decoder: What becomes of each image.
    """

    def __init__(self, source: Source, decoder: Decoder) -> None:
        self.source = source
        self.decoder = decoder
        self.size = max(1, _CHUNK_BYTES // (decoder.size**2 * decoder.channels))

    def __len__(self) -> int:
        """Return the number of chunks."""
        return -(-len(self.source) // self.size)

    def __getitem__(self, index: int) -> Chunk:
        """Decode a chunk."""
        pixels, outcomes = [], []
        start = index * self.size
        for position in range(start, min(start + self.size, len(self.source))):
            name = self.source.names[position]
            try:
                with self.source.image(position) as image:
                    square, note = self.decoder(image)
            except Exception as error:  # Pillow's decoders raise nearly anything
                outcomes.append((name, "skipped", _reason(error)))
                continue
            pixels.append(square)
            if note:
                outcomes.append((name, "converted", note))
        shape = (0, self.decoder.size, self.decoder.size, self.decoder.channels)
        return Chunk(np.stack(pixels) if pixels else np.empty(shape, np.uint8), outcomes)


def decode_all(
    source: Source, decoder: Decoder, num_workers: int
) -> UInt8[np.ndarray, "count height width channel"]:
    """Return all images of a split in memory.

    Raises:
        ValueError: If an image cannot be read.
    """
    shape = (len(source), decoder.size, decoder.size, decoder.channels)
    if isinstance(source, ArraySource) and source.pixels.shape == shape:
        return source.pixels
    images = np.empty(shape, np.uint8)
    chunks = Chunks(source, decoder)
    position = 0
    for chunk in tqdm(_decoded(chunks, 0, num_workers), "Reading", len(chunks), **_BAR):
        _stop_at(_skipped(chunk.outcomes))
        images[position : position + len(chunk.pixels)] = chunk.pixels
        position += len(chunk.pixels)
    return images


def prepare(
    splits: Splits,
    decoder: Decoder,
    folder: Path,
    *,
    source: str,
    settings: Mapping[str, Any],
    skip_errors: bool = False,
    overwrite: bool = False,
    num_workers: int = 0,
) -> tuple[dict[str, Prepared], list[Outcome]]:
    """Write a source's images to a folder, or go on with doing so.

    Args:
        splits: The source.
        decoder: What becomes of each image.
        folder: Where to write; made if need be.
        source: Name of the source, for the record.
        settings: The settings that the images depend on, for the record.
        skip_errors: Leave images out that cannot be read, instead of stopping at the first.
        overwrite: Replace what another preparation has left in the folder.
        num_workers: Processes that decode; 0 does it in this one.

    Returns:
        What was written, and the images that were converted or skipped.

    Raises:
        ValueError: If an image cannot be read, the folder holds something else or is being
            prepared by another process, or it cannot be written to. Then nothing is left behind,
            except after an unreadable image or an interruption what the next call goes on with.
    """
    partial = folder / PARTIAL
    plan = _plan(splits, decoder, source, settings)
    is_begun = _begun(partial) == plan
    is_done = is_prepared(folder) and not overwrite and not is_begun
    if is_done:
        _check_same(folder, splits, source, settings)
    elif not overwrite and not is_begun:
        _check_vacant(folder, splits)
    if not is_done or partial.exists():
        with _cleaning_up(folder), _locked(partial):
            if not is_done:
                _start(partial, plan)
                if not (partial / "complete").exists():
                    _check_space(splits, decoder, partial)
                    outcomes = []
                    for name, images in splits.sources.items():
                        writer = _Writer(partial, name)
                        outcomes += writer.run(Chunks(images, decoder), skip_errors, num_workers)
                    _describe(partial, splits, outcomes, source, settings)
                _publish(folder, partial)
            shutil.rmtree(partial, ignore_errors=True)
    outcomes = _read_report(folder)
    skipped = [(o.image, o.reason) for o in outcomes if o.outcome == "skipped"]
    if skipped and not skip_errors:
        raise ValueError(
            f"dataset.root: '{folder}' was prepared without {len(skipped)} of the images, such as "
            f"{_listed(skipped[:1])}; accept that with on_error=skip, or replace or remove them "
            "and set overwrite=true"
        )
    return open_prepared(folder), outcomes


class _Writer:
    """Append the chunks of one split to its file, with a note after each."""

    def __init__(self, partial: Path, split: str) -> None:
        self.split = split
        self.data = partial / f"{split}.npy"
        self.journal = partial / f"{split}.journal"
        self.names = partial / f"{split}.txt"

    def run(self, chunks: Chunks, skip_errors: bool, num_workers: int) -> list[Outcome]:
        notes = self._notes(skip_errors)
        num_images = notes[-1]["num_images"] if notes else 0
        shape = (chunks.decoder.size, chunks.decoder.size, chunks.decoder.channels)
        self.data.touch()
        with self.data.open("r+b") as data, self.journal.open("a", encoding="utf-8") as journal:
            data.truncate(_HEADER_BYTES + num_images * math.prod(shape))
            data.seek(0, os.SEEK_END)
            remaining = _decoded(chunks, len(notes), num_workers)
            options = {"initial": len(notes), "unit": "chunk", **_BAR, "leave": True}
            for chunk in tqdm(remaining, f"Preparing {self.split}", len(chunks), **options):
                if not skip_errors:
                    _stop_at(_skipped(chunk.outcomes), "source: ")
                data.write(chunk.pixels.tobytes())
                _to_disk(data)
                num_images += len(chunk.pixels)
                note = {"num_images": num_images, "outcomes": chunk.outcomes}
                journal.write(json.dumps(note) + "\n")
                _to_disk(journal)
                notes.append(note)
            data.seek(0)
            data.write(_header((num_images, *shape)))
            _to_disk(data)
        outcomes = [outcome for note in notes for outcome in note["outcomes"]]
        skipped = dict(_skipped(outcomes))
        if num_images == 0:
            self.journal.unlink()  # so that the next call looks again
            raise ValueError(
                f"source: no image of the split '{self.split}' can be read, beginning with "
                f"{_listed([*skipped.items()][:1])}; replace them"
            )
        kept = [name for name in chunks.source.names if name not in skipped]
        _write(self.names, "".join(f"{name}\n" for name in kept))
        return [Outcome(self.split, *outcome) for outcome in outcomes]

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
            if note is None or (_skipped(note["outcomes"]) and not skip_errors):
                break
            notes.append(note)
            size += len(line)
        os.truncate(self.journal, size)
        return notes


_BAR: dict[str, Any] = {"leave": False, "disable": None}


def _decoded(chunks: Chunks, start: int, num_workers: int) -> Iterator[Chunk]:
    remaining = range(start, len(chunks))
    num_workers = min(num_workers, len(remaining) // 2)  # processes cost more than two chunks
    loader = DataLoader(
        chunks,
        batch_size=None,
        sampler=remaining,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator(),  # the global one is left alone
    )
    return iter(loader)


def _end_with_parent(_: int) -> None:
    """End this worker when its parent is killed; else it waits for good to hand over a chunk."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_it_is(chunk: Any) -> Chunk:  # noqa: ANN401 -- DataLoader thinks it a list
    return chunk


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text is another one in every run
        return "not an image of a known format"
    return " ".join(str(error).split()) or type(error).__name__


def _skipped(outcomes: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """Return name and reason of those that could not be read."""
    return [(name, reason) for name, outcome, reason in outcomes if outcome == "skipped"]


def _listed(skipped: list[tuple[str, str]]) -> str:
    return ", ".join(f"'{name}' ({reason})" for name, reason in skipped)


def _stop_at(skipped: list[tuple[str, str]], prefix: str = "") -> None:
    if skipped:
        images, them = ("image", "it") if len(skipped) == 1 else ("images", "them")
        raise ValueError(
            f"{prefix}cannot read the {images} {_listed(skipped[:5])}"
            f"{' and more' if len(skipped) > 5 else ''}; replace or remove {them}, or leave such "
            "images out by preparing the source with on_error=skip"
        )


def _plan(splits: Splits, decoder: Decoder, source: str, settings: Mapping[str, Any]) -> str:
    """Return all that the result depends on, in short."""
    digest = hashlib.sha256()
    digest.update(repr((source, splits.format, decoder, sorted(settings.items()))).encode())
    digest.update(repr(_CHUNK_BYTES).encode())
    for name, images in splits.sources.items():
        digest.update(repr((name, len(images))).encode())
        for image in images.names:
            digest.update(image.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def _check_same(folder: Path, splits: Splits, source: str, settings: Mapping[str, Any]) -> None:
    """Check that what is there was made the same way and is whole."""
    prepared = open_prepared(folder)
    known = next(iter(prepared.values()))
    found = {"source": known.source, **known.settings}
    wanted = {"source": source, **settings}
    for split in SPLITS:
        if split in prepared:
            found[f"{split} images"] = prepared[split].num_images + prepared[split].num_skipped
        if split in splits.sources:
            wanted[f"{split} images"] = len(splits.sources[split])
    for name in found | wanted:
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"dataset.root: '{folder}' holds images that were prepared with {name}="
                f"{found.get(name)}, not {wanted.get(name)}; set another dataset.root=FOLDER, or "
                "overwrite=true"
            )
    verify(folder, prepared)


def _check_vacant(folder: Path, splits: Splits) -> None:
    """Check that no file is there that somebody else may have written."""
    names = [f"{split}{suffix}" for split in splits.sources for suffix in _SUFFIXES]
    taken = [name for name in (*names, REPORT) if os.path.lexists(folder / name)]
    if taken:
        raise ValueError(
            f"dataset.root: '{folder}' holds {', '.join(taken)} already, not as a whole "
            "preparation; set another dataset.root=FOLDER, or overwrite=true to replace them"
        )


@contextmanager
def _cleaning_up(folder: Path) -> Iterator[None]:
    """Explain what the system refuses, and take away what was begun."""
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        yield
    except OSError as error:
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # one that is not empty stays
                path.rmdir()
        raise ValueError(
            f"dataset.root: cannot write to '{folder}' ({error.strerror or error}); "
            "make room or give another dataset.root=FOLDER"
        ) from error


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / "lock")
    try:
        lock.acquire(timeout=1)  # the workers of a killed process may hold it for a moment
    except Timeout as error:
        raise ValueError(
            f"dataset.root: '{partial.parent}' is being prepared by another process; "
            "wait for it, or give another dataset.root=FOLDER"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _begun(partial: Path) -> str | None:
    """Return the plan of an interrupted preparation."""
    try:
        return (partial / "plan").read_text(encoding="utf-8")
    except OSError:
        return None


def _start(partial: Path, plan: str) -> None:
    """Keep what an interrupted preparation by the same plan has left, and nothing else."""
    if _begun(partial) != plan:
        (partial / "plan").unlink(missing_ok=True)  # first: half of the rest is worth nothing
        for path in partial.iterdir():
            if path.name != "lock":
                path.unlink()
        _write(partial / "plan", plan)


def _check_space(splits: Splits, decoder: Decoder, partial: Path) -> None:
    num_images = sum(len(images) for images in splits.sources.values())
    needed = num_images * decoder.size**2 * decoder.channels
    there = sum(path.stat().st_size for path in partial.glob("*.npy"))
    free = shutil.disk_usage(partial).free
    if needed - there > free:
        raise OSError(f"{(needed - there) / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def _describe(
    partial: Path,
    splits: Splits,
    outcomes: list[Outcome],
    source: str,
    settings: Mapping[str, Any],
) -> None:
    for name in splits.sources:
        data = partial / f"{name}.npy"
        counts = {
            outcome: sum(o.split == name and o.outcome == outcome for o in outcomes)
            for outcome in ("converted", "skipped")
        }
        shape = list(np.load(data, mmap_mode="r").shape)
        known = Prepared(
            split=name,
            splits=list(splits.sources),
            num_images=shape[0],
            shape=shape,
            layout=LAYOUT,
            sha256=checksum(data, f"Verifying {name}"),
            source=source,
            format=splits.format,
            settings=dict(settings),
            num_converted=counts["converted"],
            num_skipped=counts["skipped"],
        )
        _write(partial / f"{name}.json", known.to_json())
    report = io.StringIO()
    writer = csv.DictWriter(report, ["split", "image", "outcome", "reason"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(outcome) for outcome in outcomes)
    _write(partial / REPORT, report.getvalue())
    _write(partial / "complete", "\n".join(splits.sources))


def _publish(folder: Path, partial: Path) -> None:
    """Move everything to its place, the descriptions last; to do it again does no harm."""
    new = (partial / "complete").read_text(encoding="utf-8").split("\n")
    for split in set(SPLITS) - set(new):
        if is_ours(folder / f"{split}.json"):
            for suffix in _SUFFIXES:
                (folder / f"{split}{suffix}").unlink(missing_ok=True)
    for path in partial.glob("*.json"):
        (folder / path.name).unlink(missing_ok=True)
    for pattern in ("*.npy", "*.txt", "*.csv", "*.json"):
        for path in partial.glob(pattern):
            path.replace(folder / path.name)
    (partial / "plan").unlink()


def _read_report(folder: Path) -> list[Outcome]:
    path = folder / REPORT
    if not path.exists():
        raise ValueError(damaged(path, "it is missing"))
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [Outcome(**row) for row in csv.DictReader(file)]


def _header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    assert len(buffer.getvalue()) == _HEADER_BYTES
    return buffer.getvalue()


def _write(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        _to_disk(file)
    temporary.replace(path)


def _to_disk(file: Any) -> None:  # noqa: ANN401 -- any open file
    file.flush()
    os.fsync(file.fileno())
