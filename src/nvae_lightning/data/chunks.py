"""A split as chunks of images, decoded by one or several processes."""

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

from nvae_lightning.data.dataset import already_a_batch
from nvae_lightning.data.decode import Decoder
from nvae_lightning.data.eight_bits import Note
from nvae_lightning.data.files import TooLargeError
from nvae_lightning.data.names import one_line, printable
from nvae_lightning.data.readers import ArraySource, Source
from nvae_lightning.data.summary import Summary

CHUNK_BYTES = 1 << 22

_BARE = "bare pixels"

BAR: dict[str, Any] = {"leave": False, "disable": None}


@dataclass(frozen=True)
class Chunk:
    """Some decoded images of a split.

    Args:
        pixels: The readable images.
        outcomes: Name, outcome and reason of each image for the report.
        summary: Counts of all images by kind.
    """

    pixels: UInt8[np.ndarray, "count height width channel"]
    outcomes: list[tuple[str, str, str]]
    summary: Summary


class Chunks(Dataset[Chunk]):
    """A split as chunks of about 4 MB, decoded on access.

    Args:
        source: Images of the split.
        decoder: Conversion of each image.
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
                    warnings.simplefilter("ignore")
                    warnings.simplefilter("always", UserWarning)
                    with self.source.image(position) as image:
                        kind = image.format or _BARE
                        square, notes = self.decoder(image)
            except Exception as error:  # Pillow's decoders raise nearly any type
                reason, kind = _reason(error)
                outcomes.append((name, "skipped", reason))
                summary.count("skipped", kind)
                continue
            pixels.append(square)
            summary.count("read", kind)
            texts = dict.fromkeys(" ".join(str(one.message).split()) for one in warned)
            notes += [Note("read with a warning", f"warning: {text}") for text in texts]
            if notes:
                outcomes.append((name, "converted", ", ".join(map(str, notes))))
                summary.note(notes)
        shape = (0, self.decoder.size, self.decoder.size, self.decoder.channels)
        array = np.stack(pixels) if pixels else np.empty(shape, np.uint8)
        return Chunk(array, outcomes, summary)


def decode_all(
    source: Source, decoder: Decoder, num_workers: int
) -> tuple[UInt8[np.ndarray, "count height width channel"], Summary]:
    """Return all images of a split in memory, and a summary of their conversion.

    Raises:
        ValueError: If an image is unreadable.
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
        chunks: All chunks.
        start: Index of the first chunk.
        num_workers: Number of processes that decode; 0 stands for this one.
    """
    remaining = range(start, len(chunks))
    num_workers = min(num_workers, len(remaining) // 2)  # a process costs more than two chunks
    loader = DataLoader(
        chunks,
        batch_size=None,
        sampler=remaining,
        num_workers=num_workers,
        collate_fn=already_a_batch,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator(),  # instead of the global one
    )
    yield from loader


def _end_with_parent(_: int) -> None:
    """End this worker when its parent is killed; it would otherwise block forever in its queue."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _reason(error: Exception) -> tuple[str, str]:
    """Return the reason why an image is unreadable, and the kind that a summary counts."""
    if isinstance(error, UnidentifiedImageError):  # its own text differs in every run
        reason = "not an image of a known format"
        return reason, reason
    reason = one_line(error)
    return reason, "too large" if isinstance(error, TooLargeError) else "damaged or unreadable"


def skipped_in(outcomes: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """Return name and reason of the unreadable images."""
    return [(name, reason) for name, outcome, reason in outcomes if outcome == "skipped"]


def listed(skipped: list[tuple[str, str]]) -> str:
    """Return names and reasons of unreadable images in one line."""
    return ", ".join(f"'{printable(name)}' ({reason})" for name, reason in skipped)


def stop_at(skipped: list[tuple[str, str]], prefix: str = "") -> None:
    """Raise an error that names the unreadable images, if there are any.

    Raises:
        ValueError: If there are any.
    """
    if skipped:
        images, them = ("image", "it") if len(skipped) == 1 else ("images", "them")
        raise ValueError(
            f"{prefix}cannot read the {images} {listed(skipped[:5])}"
            f"{' and more' if len(skipped) > 5 else ''}; replace or remove {them}, or leave such "
            "images out by preparing the source with on_error=skip"
        )
