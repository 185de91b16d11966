"""Prepared images: per split one ``.npy`` of bytes, read by memory map, and a small JSON.

A folder holds for each split, say train, ``train.npy`` (count, height, width, channel; uint8),
``train.json`` (what `Prepared` lists) and ``train.txt`` (where each image came from, a line each).
The JSON is written last: without it a split is not there.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from nvae_lightning.data.files import open_regular, read_regular
from nvae_lightning.data.names import unescaped
from nvae_lightning.data.readers import SPLITS
from nvae_lightning.data.summary import Summary

LAYOUT = "count height width channel, uint8"
_BLOCK = 1 << 24
_MAX_DESCRIPTION = 1 << 20  # bytes


@dataclass(frozen=True)
class Prepared:
    """What is known of a prepared split.

    Args:
        split: Its name.
        splits: All splits that were prepared together.
        num_images: Their number.
        shape: Of the array.
        layout: Meaning and type of the array.
        sha256: Checksum of the ``.npy``.
        source: What it was made of.
        format: What the source was recognised as.
        settings: The settings that the images depend on.
        num_converted: Images that had to be converted; ``report.csv`` names them.
        num_skipped: Images that could not be read; ``report.csv`` names them.
        summary: `Summary` of the split as plain containers; the first split's has the files that
            are in none, too.
    """

    split: str
    splits: list[str]
    num_images: int
    shape: list[int]
    layout: str
    sha256: str
    source: str
    format: str
    settings: dict[str, Any]
    num_converted: int
    num_skipped: int
    summary: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of the JSON file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def damaged(path: Path, reason: str) -> str:
    """Return the error for a file that is not what was written."""
    return f"dataset.root: '{path}' is damaged ({reason}); prepare it again with overwrite=true"


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds prepared images, whole or not."""
    return any(is_ours(path) for path in folder.glob("*.json"))


def open_prepared(folder: Path) -> dict[str, Prepared]:
    """Return what is known of each split.

    Raises:
        ValueError: If a split is missing.
    """
    found = {path.stem: _read(path) for path in folder.glob("*.json") if is_ours(path)}
    for known in list(found.values()):
        for split in known.splits:
            path = folder / f"{split}.npy"
            if split not in found or not path.is_file():
                raise ValueError(damaged(path, "it is missing, or was not completed"))
    return {split: found[split] for split in SPLITS if split in found}


def open_images(folder: Path, known: Prepared) -> UInt8[np.ndarray, "count height width channel"]:
    """Return the images of a split as a read-only memory map.

    Raises:
        ValueError: If the file is not what was written.
    """
    path = folder / f"{known.split}.npy"
    try:
        open_regular(path).close()
        images = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy evaluates the header, and mmap what it says
        raise ValueError(damaged(path, " ".join(str(error).split()))) from error
    if list(images.shape) != known.shape or images.dtype != np.uint8:
        found = f"{images.dtype} {images.shape} instead of uint8 {tuple(known.shape)}"
        raise ValueError(damaged(path, found))
    return images


def read_names(folder: Path, split: str) -> list[str]:
    """Return the name of each image of a prepared split, in order.

    Raises:
        ValueError: If their file is damaged.
    """
    path = folder / f"{split}.txt"
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8", "surrogateescape")
    except (OSError, ValueError) as error:
        raise ValueError(damaged(path, str(error))) from error
    return [unescaped(line) for line in text.split("\n")[:-1]]


def read_summary(splits: Mapping[str, Prepared]) -> Summary:
    """Return what became of the images of all splits when they were prepared."""
    summary = Summary()
    for known in splits.values():
        summary.add(Summary.from_dict(known.summary))
    return summary


def check_prepared(
    folder: Path, splits: Mapping[str, Prepared], image_size: int, channels: int
) -> None:
    """Check that images were prepared as they are wanted.

    Raises:
        ValueError: If they are of another size, or number of channels.
    """
    for known in splits.values():
        _, side, _, found_channels = known.shape
        for setting, value, found in (
            ("dataset.image.size", image_size, side),
            ("dataset.image.channels", channels, found_channels),
        ):
            if value != found:
                raise ValueError(
                    f"{setting}: got {value}, but the images in '{folder}' were prepared with "
                    f"{found}; set {setting}={found}, or prepare '{known.source}' again with "
                    "another dataset.root=FOLDER"
                )


def verify(folder: Path, splits: Mapping[str, Prepared]) -> None:
    """Compare every split with its checksum.

    Raises:
        ValueError: If one does not match.
    """
    for split, known in splits.items():
        path = folder / f"{split}.npy"
        if checksum(path, f"Verifying {split}") != known.sha256:
            raise ValueError(damaged(path, "its checksum is not the one that was written"))


def checksum(path: Path, description: str) -> str:
    """Return the SHA-256 of a file, with a progress bar where that takes long."""
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


def is_ours(path: Path) -> bool:
    """Whether a file is the description of a prepared split."""
    try:
        content = json.loads(read_regular(path, _MAX_DESCRIPTION))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("layout") == LAYOUT


def _read(path: Path) -> Prepared:
    try:
        known = Prepared(**json.loads(read_regular(path, _MAX_DESCRIPTION)))
        assert known.split == path.stem
        assert known.split in SPLITS
        assert set(known.splits) <= set(SPLITS)
        assert len(known.shape) == 4
        assert all(type(length) is int for length in (known.num_images, *known.shape))
        read_summary({known.split: known}).lines()
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or "it does not describe its split"
        raise ValueError(damaged(path, reason)) from error
    return known
