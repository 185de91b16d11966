"""From a source to prepared images, by all cores, in steps that survive an interruption.

One process writes, in order, to ``.partial/`` in the target; after every chunk of images it notes
in a journal how far it came. A new start cuts off what came after the last note and resumes from
there. When all splits are complete they are moved to their places.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from nvae_lightning.data import chunks
from nvae_lightning.data.chunks import Chunks, listed
from nvae_lightning.data.decode import Decoder
from nvae_lightning.data.files import read_regular
from nvae_lightning.data.readers import SPLITS, Splits
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
from nvae_lightning.data.summary import REPORT, Outcome, Summary, from_csv, left_out, to_csv
from nvae_lightning.data.writing import Writer, write

PARTIAL = ".partial"

_SUFFIXES = (".npy", ".txt", ".json")  # of a split's files; the last says that they are there


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
    """Write a source's images to a folder, or resume doing so.

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
        What was written, and the images that were converted or skipped, with the files that are
        none of them.

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
                    found = {
                        name: Writer(partial, name).run(
                            Chunks(images, decoder), skip_errors, num_workers
                        )
                        for name, images in splits.sources.items()
                    }
                    _describe(partial, splits, found, source, settings)
                _publish(folder, partial)
            shutil.rmtree(partial, ignore_errors=True)
    outcomes = _read_report(folder)
    skipped = [(o.image, o.reason) for o in outcomes if o.split and o.outcome == "skipped"]
    if skipped and not skip_errors:
        raise ValueError(
            f"dataset.root: '{folder}' was prepared without {len(skipped)} of the images, such as "
            f"{listed(skipped[:1])}; accept that with on_error=skip, or replace or remove them "
            "and set overwrite=true"
        )
    return open_prepared(folder), outcomes


def _plan(splits: Splits, decoder: Decoder, source: str, settings: Mapping[str, Any]) -> str:
    """Return all that the result depends on, in short."""
    digest = hashlib.sha256()
    digest.update(repr((source, splits.format, decoder, sorted(settings.items()))).encode())
    digest.update(repr(chunks.CHUNK_BYTES).encode())
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
        write(partial / "plan", plan)


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
    found: Mapping[str, tuple[list[Outcome], Summary]],
    source: str,
    settings: Mapping[str, Any],
) -> None:
    beside = left_out(splits.left_out)
    for name, (outcomes, summary) in found.items():
        data = partial / f"{name}.npy"
        counts = {
            outcome: sum(o.outcome == outcome for o in outcomes)
            for outcome in ("converted", "skipped")
        }
        summary.add(beside)  # counted once, with the first split
        beside = Summary()
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
            summary=summary.to_dict(),
        )
        write(partial / f"{name}.json", known.to_json())
    outcomes = [outcome for some, _ in found.values() for outcome in some]
    write(partial / REPORT, to_csv([*outcomes, *splits.left_out]))
    write(partial / "complete", "\n".join(splits.sources))


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
    try:
        content = read_regular(path)
        return from_csv(content.decode("utf-8", "surrogateescape"))
    except FileNotFoundError as error:
        raise ValueError(damaged(path, "it is missing")) from error
    except (OSError, ValueError) as error:
        raise ValueError(damaged(path, str(error))) from error
