"""The interface of all sources: splits, each a sequence of named images."""

import hashlib
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import ModuleType
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from nvae_lightning.data.summary import Outcome

Item = TypeVar("Item")
Pixels = UInt8[np.ndarray, "count height width channel"]

SPLITS = ("train", "validation", "test")

_SPLIT_NAME = re.compile(r"(train|test|val)(?:ing|id|idation)?(?:[-_]\d+x\d+)?", re.IGNORECASE)


class Source(ABC):
    """Images of one split in a fixed order.

    Sources can be pickled; each process opens the files for itself.

    Args:
        names: Name of each image, for reports.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Return an image, decoded or not."""


class ArraySource(Source):
    """Images of one size in memory.

    Args:
        pixels: All images.
    """

    def __init__(self, pixels: Pixels) -> None:
        super().__init__([f"{index:08d}" for index in range(len(pixels))])
        self.pixels = pixels

    def image(self, index: int) -> Image.Image:
        """Return an image."""
        return from_pixels(self.pixels[index])


@dataclass(frozen=True)
class Splits:
    """Images of a source, split for training and testing.

    Args:
        format: Name of the recognised format.
        sources: Images by split: ``train`` and ``test``, and perhaps ``validation``.
        left_out: Files that are not read.
    """

    format: str
    sources: Mapping[str, Source]
    left_out: Sequence[Outcome] = ()


@dataclass(frozen=True)
class Wanted:
    """Settings that select the images of a source.

    Args:
        image_size: Side of the model's images.
        test_fraction: Part of the images that is held out if the source has no splits, of at
            least one but not of all.
        split_seed: Seed of the choice of test images.

    Raises:
        ValueError: If the fraction is not between 0 and 1.
    """

    image_size: int
    test_fraction: float
    split_seed: int

    def __post_init__(self) -> None:
        if not 0 < self.test_fraction < 1:
            raise ValueError(
                f"dataset.test_fraction: got {self.test_fraction}, but it must lie between 0 and "
                "1, both excluded; set for example dataset.test_fraction=0.1"
            )

    def settings(self) -> dict[str, float | int]:
        """Return the settings that the splits depend on."""
        return {"test_fraction": self.test_fraction, "split_seed": self.split_seed}

    def split(self, names: Sequence[str], where: str) -> dict[str, list[int]]:
        """Return the sorted indices of a random training and test split.

        The images with the smallest SHA-256 of ``seed/name`` are held out, so that the choice is
        the same on every machine and one more image moves at most one. The name is without folders
        and suffix if it is then unique, otherwise it is the whole path.

        Args:
            names: Name of each image.
            where: Description of the source, for an error message.

        Raises:
            ValueError: If there are fewer than two images.
        """
        if len(names) < 2:
            number = "one image only" if names else "no images"
            raise ValueError(f"{where} holds {number}, but a split requires two; add images")
        paths = [PurePosixPath(name).with_suffix("") for name in names]
        stems = [path.name for path in paths]
        keys = stems if len(set(stems)) == len(stems) else [path.as_posix() for path in paths]
        drawn = [
            hashlib.sha256(f"{self.split_seed}/{key}".encode(errors="surrogateescape")).digest()
            for key in keys
        ]
        # Two paths that differ in their suffix have the same hash; the suffix breaks the tie.
        order = sorted(range(len(names)), key=lambda index: (drawn[index], names[index]))
        num_test = min(max(1, round(self.test_fraction * len(names))), len(names) - 1)
        return {"train": sorted(order[num_test:]), "test": sorted(order[:num_test])}


def split_name(name: str) -> str | None:
    """Return the split that a folder's, shard's or archive's name means, or None.

    >>> split_name("train_32x32"), split_name("valid"), split_name("photos")
    ('train', 'validation', None)
    """
    match = _SPLIT_NAME.fullmatch(name)
    if match is None:
        return None
    return "validation" if match[1].lower() == "val" else match[1].lower()


def by_split(places: Iterable[tuple[str, Item]], where: str) -> dict[str, Item]:
    """Return the places whose names mean a split, by split.

    Raises:
        ValueError: If two mean the same split.
    """
    found: dict[str, Item] = {}
    for name, place in places:
        which = split_name(name)
        if which in found:
            raise ValueError(
                f"{where} has the split '{which}' twice, '{found[which]}' and '{place}'; "
                "remove one of them"
            )
        if which is not None:
            found[which] = place
    return found


def check_splits(splits: Mapping[str, Item], where: str, alternative: str = "") -> dict[str, Item]:
    """Return splits in the order of `SPLITS`; without a test split, validation becomes it.

    Args:
        splits: Splits by name, at least one.
        where: Description of the source, for an error message.
        alternative: Remedy for a missing split other than adding it.

    Raises:
        ValueError: If the training split or the test split is missing.
    """
    found = {name: splits[name] for name in SPLITS if name in splits}
    if "train" not in found or len(found) == 1:
        present, absent = next(iter(found)), "test" if "train" in found else "train"
        raise ValueError(
            f"{where} has a split '{present}' but no split '{absent}'; add '{absent}'{alternative}"
        )
    if "test" not in found:
        found["test"] = found.pop("validation")
    return found


def from_pixels(pixels: UInt8[np.ndarray, "height width channel"]) -> Image.Image:
    """Return an array as an image, grey if it has one channel."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def require(package: str, extra: str) -> ModuleType:
    """Import a package that only some sources need.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"reading this requires the package {package} ({error}); install it: "
            f"pip install 'nvae_lightning[{extra}]'"
        ) from error
