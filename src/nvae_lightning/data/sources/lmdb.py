"""LMDB databases: one per split, decimal keys, each value an image file or its bare pixels.

It is how users of the published code keep CelebA, CelebA HQ, ImageNet 32 and FFHQ.
"""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nvae_lightning.data.sources.base import (
    Source,
    Splits,
    Wanted,
    check_splits,
    from_pixels,
    split_name,
)
from nvae_lightning.data.sources.optional import require

_FILE = "data.mdb"


class Database(Source):
    """Images of one LMDB database.

    Args:
        path: Folder of the database.

    Raises:
        ValueError: If it is empty or cannot be read.
    """

    _environment: tuple[int, Any] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._begin() as transaction:
            keys = [bytes(key).decode() for key in transaction.cursor().iternext(values=False)]
            if not keys:
                raise ValueError(f"no images in '{path}'")
            if all(key.isdecimal() for key in keys):
                keys.sort(key=int)
            super().__init__(keys)
            self.shape = _pixel_shape([transaction.get(key.encode()) for key in keys[:16]])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_environment"}

    def image(self, index: int) -> Image.Image:
        """Return an image."""
        with self._begin() as transaction:
            value = transaction.get(self.names[index].encode())
        if self.shape is None:
            return Image.open(io.BytesIO(value))
        return from_pixels(np.frombuffer(value, np.uint8).reshape(self.shape))

    def _begin(self) -> Any:  # noqa: ANN401 -- the package has no types
        if self._environment is None or self._environment[0] != os.getpid():
            lmdb = require("lmdb", "lmdb")
            try:
                environment = lmdb.open(str(self.path), readonly=True, lock=False, readahead=False)
            except lmdb.Error as error:
                raise ValueError(f"'{self.path}' is no LMDB database ({error})") from error
            self._environment = os.getpid(), environment
        return self._environment[1].begin()


def find(path: Path, wanted: Wanted) -> Splits | None:
    """Find one database per split (``train.lmdb``, ``validation.lmdb`` or such)."""
    if not path.is_dir():
        return None
    folders = [folder for folder in (path, *sorted(path.iterdir())) if (folder / _FILE).is_file()]
    if not folders:
        return None
    by_split = {split_name(folder.stem): folder for folder in folders}
    by_split.pop(None, None)
    if not by_split:
        raise ValueError(
            f"'{folders[0]}' does not say which split it holds; name the databases "
            "train.lmdb and test.lmdb, and give the folder that they are in"
        )
    named = {name: folder for name, folder in by_split.items() if name is not None}
    splits = check_splits(named, f"'{path}'")
    return Splits("LMDB", {name: Database(folder) for name, folder in splits.items()})


def _pixel_shape(values: Sequence[bytes]) -> tuple[int, int, int] | None:
    """Return the shape of bare square images; None if the values are image files."""
    length = len(values[0])
    if any(len(value) != length for value in values):
        return None
    try:
        Image.open(io.BytesIO(values[0])).verify()
    except Exception:  # Pillow's decoders raise nearly anything
        for channels in (3, 1):
            side = math.isqrt(length // channels)
            if channels * side * side == length:
                return side, side, channels
    return None
