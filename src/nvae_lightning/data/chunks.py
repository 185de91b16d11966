"""A split as chunks of images, decoded by one or several processes."""

import math
import os
import threading
import warnings
from collections.abc import Iterator
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
from nvae_lightning.data.files import TooLargeError
from nvae_lightning.data.messages import one_line, printable
from nvae_lightning.data.readers import ArraySource, Source
from nvae_lightning.data.summary import Summary, merged

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
        self.shape = (decoder.size, decoder.size, decoder.channels)
        self.size = max(1, CHUNK_BYTES // math.prod(self.shape))

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
                reason = _reason(error)
                outcomes.append((name, "skipped", reason))
                summary.count("skipped", reason)
                continue
            pixels.append(square)
            summary.count("read", kind)
            texts = dict.fromkeys(" ".join(str(one.message).split()) for one in warned)
            notes += [f"read with a warning: {text}" for text in texts]
            if notes:
                outcomes.append((name, "converted", ", ".join(notes)))
                summary.count("converted", *notes)
        array = np.stack(pixels) if pixels else np.empty((0, *self.shape), np.uint8)
        return Chunk(array, outcomes, summary)


def decode_all(
    source: Source, decoder: Decoder, num_workers: int | None
) -> tuple[UInt8[np.ndarray, "count height width channel"], Summary]:
    """Return all images of a split in memory, and a summary of their conversion.

    Raises:
        ValueError: If an image is unreadable.
    """
    chunks = Chunks(source, decoder)
    shape = (len(source), *chunks.shape)
    if isinstance(source, ArraySource) and source.pixels.shape == shape:
        summary = Summary()
        summary.count("read", _BARE, files=len(source))
        return source.pixels, summary
    images = np.empty(shape, np.uint8)
    summaries = []
    position = 0
    for chunk in tqdm(decoded(chunks, 0, num_workers), "Reading", len(chunks), **BAR):
        stop_at(skipped_in(chunk.outcomes))
        images[position : position + len(chunk.pixels)] = chunk.pixels
        position += len(chunk.pixels)
        summaries.append(chunk.summary)
    return images, merged(summaries)


def decoded(chunks: Chunks, start: int, num_workers: int | None) -> Iterator[Chunk]:
    """Yield the chunks of a split in order.

    Args:
        chunks: All chunks.
        start: Index of the first chunk.
        num_workers: Number of processes that decode; 0 stands for this one, None for one per core.
    """
    remaining = range(start, len(chunks))
    if num_workers is None:
        num_workers = num_cores()
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


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _end_with_parent(_: int) -> None:
    """End this worker when its parent is killed; it would otherwise block forever in its queue."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _reason(error: Exception) -> str:
    """Return the reason why an image is unreadable."""
    if isinstance(error, UnidentifiedImageError):  # its own text differs in every run
        return "not an image of a known format"
    kind = "too large" if isinstance(error, TooLargeError) else "damaged or unreadable"
    return f"{kind}: {one_line(error)}"


def skipped_in(outcomes: list[Any]) -> dict[str, str]:
    """Return the unreadable images and the reasons."""
    return {name: reason for name, outcome, reason in outcomes if outcome == "skipped"}


def stop_at(skipped: dict[str, str], prefix: str = "") -> None:
    """Raise an error that names the unreadable images, if there are any.

    Raises:
        ValueError: If there are any.
    """
    if skipped:
        listed = [f"'{printable(name)}' ({reason})" for name, reason in skipped.items()]
        images, them = ("image", "it") if len(skipped) == 1 else ("images", "them")
        raise ValueError(
            f"{prefix}cannot read the {images} {', '.join(listed[:5])}"
            f"{' and more' if len(skipped) > 5 else ''}; replace or remove {them}, or leave such "
            "images out by preparing the source with on_error=skip"
        )
