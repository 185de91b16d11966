"""Prepared images: one memory-mapped ``.npy`` of bytes and a small JSON per split.

A folder holds for each split, for example train, ``train.npy`` (count, height, width, channel;
uint8), ``train.json`` (the fields of `Prepared`) and ``train.txt`` (the name of each image). The
JSON is written last: without it the split does not exist.
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
from nvae_lightning.data.names import one_line
from nvae_lightning.data.readers import SPLITS
from nvae_lightning.data.summary import Summary

LAYOUT = "count height width channel, uint8"
_BLOCK = 1 << 24
_MAX_DESCRIPTION = 1 << 20  # bytes


@dataclass(frozen=True)
class Prepared:
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
        settings: Settings that the images depend on.
        num_converted: Number of images that were converted; ``report.csv`` names them.
        num_skipped: Number of unreadable images; ``report.csv`` names them.
        summary: `Summary` of the split as plain containers; that of the first split includes the
            files that are in none.
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
    """Return the error message for a damaged file."""
    return f"dataset.root: '{path}' is damaged ({reason}); prepare it again with overwrite=true"


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds prepared images, complete or not."""
    return any(is_ours(path) for path in folder.glob("*.json"))


def open_prepared(folder: Path) -> dict[str, Prepared]:
    """Return the descriptions of all splits.

    Raises:
        ValueError: If a split is missing or its description is damaged.
    """
    contents = {path: _content(path) for path in folder.glob("*.json")}
    found = {path.stem: _checked(path, content) for path, content in contents.items() if content}
    for known in list(found.values()):
        for split in known.splits:
            path = folder / f"{split}.npy"
            if split not in found or not path.is_file():
                raise ValueError(damaged(path, "it is missing, or was not completed"))
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
        raise ValueError(damaged(path, one_line(error))) from error
    if list(images.shape) != known.shape or images.dtype != np.uint8:
        found = f"{images.dtype} {images.shape} instead of uint8 {tuple(known.shape)}"
        raise ValueError(damaged(path, found))
    return images


def read_summary(splits: Mapping[str, Prepared]) -> Summary:
    """Return the summary of all splits."""
    summary = Summary()
    for known in splits.values():
        summary.add(Summary.from_dict(known.summary))
    return summary


def check_prepared(
    folder: Path, splits: Mapping[str, Prepared], image_size: int, channels: int
) -> None:
    """Check the size and the number of channels of prepared images.

    Raises:
        ValueError: If one differs.
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


def is_ours(path: Path) -> bool:
    """Whether a file is the description of a prepared split."""
    return _content(path) is not None


def _content(path: Path) -> dict[str, Any] | None:
    """Return the description of a prepared split; None if the file is something else."""
    try:
        content = json.loads(read_regular(path, _MAX_DESCRIPTION))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.get("layout") == LAYOUT else None


def _checked(path: Path, content: dict[str, Any]) -> Prepared:
    try:
        known = Prepared(**content)
        assert known.split == path.stem
        assert known.split in SPLITS
        assert set(known.splits) <= set(SPLITS)
        assert len(known.shape) == 4
        assert all(type(length) is int for length in (known.num_images, *known.shape))
        read_summary({known.split: known}).lines()
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(damaged(path, one_line(error))) from error
    return known
