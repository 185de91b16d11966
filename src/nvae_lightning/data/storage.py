"""Prepared images: one memory-mapped ``.npy`` of bytes and a small JSON per split.

A folder holds for each split, for example train, ``train.npy`` (count, height, width, channel;
uint8), ``train.json`` (the fields of `Prepared`) and ``train.txt`` (the name of each image). The
JSON is written last: without it the split does not exist.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from nvae_lightning.data.files import open_regular, read_regular
from nvae_lightning.data.messages import one_line
from nvae_lightning.data.readers import SPLITS
from nvae_lightning.data.summary import Summary

LAYOUT = "count height width channel, uint8"
_BLOCK = 1 << 24
_MAX_DESCRIPTION = 1 << 20  # bytes

Split = Literal["train", "validation", "test"]


class Prepared(BaseModel, frozen=True, strict=True):
    """Description of a prepared split.

    Args:
        split: Name of the split.
        splits: Names of all splits that were prepared together.
        num_images: Number of images.
        shape: Shape of the array.
        layout: Axes and dtype of the array.
        sha256: Checksum of the ``.npy``.
        source: Name of the source.
        format: Name of the source's format.
        settings: Settings that determine the images.
        num_skipped: Number of unreadable images; ``report.csv`` names them.
        summary: Summary of the split; that of the first split includes the files in none.
    """

    split: Split
    splits: list[Split]
    num_images: int
    shape: tuple[int, int, int, int]
    layout: str = LAYOUT
    sha256: str
    source: str
    format: str
    settings: dict[str, Any]
    num_skipped: int
    summary: Summary


def damaged(path: Path, reason: str) -> ValueError:
    """Return the error for a damaged file."""
    return ValueError(
        f"dataset.root: '{path}' is damaged ({reason}); prepare it again with overwrite=true"
    )


def is_prepared(folder: Path) -> bool:
    """Whether a folder contains prepared images, complete or not."""
    return any(is_ours(path) for path in folder.glob("*.json"))


def is_ours(path: Path) -> bool:
    """Whether a file is the description of a prepared split."""
    try:
        content = json.loads(read_regular(path, _MAX_DESCRIPTION))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("layout") == LAYOUT


def open_prepared(folder: Path) -> dict[str, Prepared]:
    """Return the descriptions of all splits.

    Raises:
        ValueError: If a split is missing or its description is damaged.
    """
    found: dict[str, Prepared] = {}
    for path in filter(is_ours, folder.glob("*.json")):
        try:
            known = Prepared.model_validate_json(read_regular(path, _MAX_DESCRIPTION))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise damaged(path, f"{place}: {first['msg']}") from error
        if known.split != path.stem:
            raise damaged(path, f"it describes the split '{known.split}'")
        found[known.split] = known
    for split in {split for known in found.values() for split in known.splits}:
        path = folder / f"{split}.npy"
        if split not in found or not path.is_file():
            raise damaged(path, "it is missing, or was not completed")
    return {split: found[split] for split in SPLITS if split in found}


def open_images(folder: Path, known: Prepared) -> UInt8[np.ndarray, "count height width channel"]:
    """Return the images of a split as a read-only memory map.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / f"{known.split}.npy"
    try:
        open_regular(path).close()
        images = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # from NumPy's parser of the header, or mmap
        raise damaged(path, one_line(error)) from error
    if images.shape != known.shape or images.dtype != np.uint8:
        found = f"{images.dtype} {images.shape} instead of uint8 {known.shape}"
        raise damaged(path, found)
    return images


def verify(folder: Path, splits: dict[str, Prepared]) -> None:
    """Compare every split with its checksum.

    Raises:
        ValueError: If one does not match.
    """
    for split, known in splits.items():
        path = folder / f"{split}.npy"
        if checksum(path, f"Verifying {split}") != known.sha256:
            raise damaged(path, "its checksum is not the one that was written")


def checksum(path: Path, description: str) -> str:
    """Return the SHA-256 of a file, with a progress bar after a second."""
    digest = hashlib.sha256()
    options = {"unit": "B", "unit_scale": True, "leave": False, "disable": None, "delay": 1.0}
    with (
        open_regular(path) as file,
        tqdm(total=os.fstat(file.fileno()).st_size, desc=description, **options) as bar,
    ):
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
