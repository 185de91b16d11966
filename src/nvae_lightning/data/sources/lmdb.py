"""LMDB databases: one per split, decimal keys, each value an image file or its bare pixels.

It is how users of the published code keep CelebA, CelebA HQ, ImageNet 32 and FFHQ.
"""

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nvae_lightning.data.sources.base import (
    Source,
    Splits,
    Wanted,
    by_split,
    check_splits,
    from_pixels,
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

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path) as transaction:
            # A key need not be text; what is not comes back the same.
            keys = [os.fsdecode(bytes(key)) for key in transaction.cursor().iternext(values=False)]
            if not keys:
                raise ValueError(f"no images in '{path}'; fetch it again")
            if all(key.isdecimal() for key in keys):
                keys.sort(key=int)
            super().__init__(keys)
            self.shape = _pixel_shape([transaction.get(os.fsencode(key)) for key in keys[:16]])

    def image(self, index: int) -> Image.Image:
        """Return an image."""
        with _reading(self.path) as transaction:
            value = transaction.get(os.fsencode(self.names[index]))
        if self.shape is None:
            return Image.open(io.BytesIO(value))
        return from_pixels(np.frombuffer(value, np.uint8).reshape(self.shape))


def find(path: Path, wanted: Wanted) -> Splits | None:
    """Find one database per split (``train.lmdb``, ``validation.lmdb`` or such).

    Raises:
        ValueError: If there is half a split, one twice, or a damaged database.
    """
    if not path.is_dir():
        return None
    folders = [folder for folder in (path, *sorted(path.iterdir())) if (folder / _FILE).is_file()]
    if not folders:
        return None
    databases = by_split([(folder.stem, folder) for folder in folders], f"'{path}'")
    if not databases:
        raise ValueError(
            f"'{folders[0]}' does not say which split it holds; name the databases "
            "train.lmdb and test.lmdb, and give the folder that they are in"
        )
    splits = check_splits(databases, f"'{path}'")
    return Splits("LMDB", {name: Database(folder) for name, folder in splits.items()})


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a database for one read: a process must not open it twice, nor keep it over a fork."""
    lmdb = require("lmdb", "lmdb")
    try:
        with lmdb.open(str(path), readonly=True, lock=False, readahead=False) as environment:
            # LMDB maps the file into memory, where to read beyond its end kills the process.
            size = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if (path / _FILE).stat().st_size < size:
                raise lmdb.CorruptedError(f"it is shorter than its {size:,} bytes")
            with environment.begin() as transaction:
                yield transaction
    except lmdb.Error as error:
        raise ValueError(
            f"'{path}' is no whole LMDB database ({error}); fetch it again"
        ) from error


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
