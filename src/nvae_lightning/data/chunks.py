"""A split as chunks of decoded images, made by one process or by many."""

import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nvae_lightning.data.checks import needing_workers
from nvae_lightning.data.decode import Decoder
from nvae_lightning.data.eight_bits import Note
from nvae_lightning.data.files import TooLargeError
from nvae_lightning.data.names import printable
from nvae_lightning.data.readers import ArraySource, Source
from nvae_lightning.data.summary import Summary

CHUNK_BYTES = 1 << 22

_BARE = "bare pixels"

BAR: dict[str, Any] = {"leave": False, "disable": None}


@dataclass(frozen=True)
class Chunk:
    """Some images of a split, decoded.

    Args:
        pixels: The images that could be read.
        outcomes: Name, outcome and reason for each that is worth a report.
        summary: All of them by kind.
    """

    pixels: UInt8[np.ndarray, "count height width channel"]
    outcomes: list[tuple[str, str, str]]
    summary: Summary


class Chunks(Dataset[Chunk]):
    """A split as chunks of some 4 MB, decoded where they are asked for.

    Args:
        source: The split.
        decoder: What becomes of each image.
    """

    def __init__(self, source: Source, decoder: Decoder) -> None:
        self.source = source
        self.decoder = decoder
        self.size = max(1, CHUNK_BYTES // (decoder.size**2 * decoder.channels))

    def __len__(self) -> int:
        """Return the number of chunks."""
        return -(-len(self.source) // self.size)

    def __getitem__(self, index: int) -> Chunk:
        """Decode a chunk."""
        pixels, outcomes, summary = [], [], Summary()
        start = index * self.size
        for position in range(start, min(start + self.size, len(self.source))):
            name = self.source.names[position]
            try:
                with warnings.catch_warnings(record=True) as warned:
                    warnings.simplefilter("always", UserWarning)
                    with self.source.image(position) as image:
                        kind = image.format or _BARE
                        square, notes = self.decoder(image)
            except Exception as error:  # Pillow's decoders raise nearly anything
                reason = _reason(error)
                outcomes.append((name, "skipped", reason))
                summary.count("skipped", _kind(error, reason))
                continue
            pixels.append(square)
            summary.count("read", kind)
            notes += [Note("read with a warning", f"warning: {one}") for one in _texts(warned)]
            if notes:
                outcomes.append((name, "converted", ", ".join(map(str, notes))))
                summary.note(notes)
        shape = (0, self.decoder.size, self.decoder.size, self.decoder.channels)
        array = np.stack(pixels) if pixels else np.empty(shape, np.uint8)
        return Chunk(array, outcomes, summary)


def decode_all(
    source: Source, decoder: Decoder, num_workers: int
) -> tuple[UInt8[np.ndarray, "count height width channel"], Summary]:
    """Return all images of a split in memory, and what was done to them.

    Raises:
        ValueError: If an image cannot be read.
    """
    shape = (len(source), decoder.size, decoder.size, decoder.channels)
    if isinstance(source, ArraySource) and source.pixels.shape == shape:
        summary = Summary()
        summary.count("read", _BARE, files=len(source))
        return source.pixels, summary
    summary = Summary()
    images = np.empty(shape, np.uint8)
    chunks = Chunks(source, decoder)
    position = 0
    for chunk in tqdm(decoded(chunks, 0, num_workers), "Reading", len(chunks), **BAR):
        stop_at(skipped_in(chunk.outcomes))
        images[position : position + len(chunk.pixels)] = chunk.pixels
        position += len(chunk.pixels)
        summary.add(chunk.summary)
    return images, summary


def decoded(chunks: Chunks, start: int, num_workers: int) -> Iterator[Chunk]:
    """Yield the chunks of a split in order.

    Args:
        chunks: The split.
        start: Number of the first chunk.
        num_workers: Processes that decode; 0 does it in this one.

    Raises:
        ValueError: If processes cannot be started.
    """
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
    with needing_workers(num_workers):
        yield from loader


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


def _kind(error: Exception, reason: str) -> str:
    if isinstance(error, TooLargeError):
        return "too large"
    return reason if isinstance(error, UnidentifiedImageError) else "damaged or unreadable"


def _texts(warned: Iterable[warnings.WarningMessage]) -> Iterable[str]:
    """Return each text of Pillow's once."""
    texts = [str(one.message) for one in warned if issubclass(one.category, UserWarning)]
    return dict.fromkeys(" ".join(text.split()) for text in texts)


def skipped_in(outcomes: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """Return name and reason of those that could not be read."""
    return [(name, reason) for name, outcome, reason in outcomes if outcome == "skipped"]


def listed(skipped: list[tuple[str, str]]) -> str:
    """Return names and reasons of images that could not be read, in one line."""
    return ", ".join(f"'{printable(name)}' ({reason})" for name, reason in skipped)


def stop_at(skipped: list[tuple[str, str]], prefix: str = "") -> None:
    """Refuse a chunk of which something could not be read.

    Raises:
        ValueError: If that is so.
    """
    if skipped:
        images, them = ("image", "it") if len(skipped) == 1 else ("images", "them")
        raise ValueError(
            f"{prefix}cannot read the {images} {listed(skipped[:5])}"
            f"{' and more' if len(skipped) > 5 else ''}; replace or remove {them}, or leave such "
            "images out by preparing the source with on_error=skip"
        )
