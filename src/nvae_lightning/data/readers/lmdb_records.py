"""LMDB databases, one per split, whose values are image files or raw pixels.

Users of the published code store CelebA, CelebA HQ, ImageNet 32 and FFHQ this way.
"""

import math
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from nvae_lightning.data.files import TooLargeError, check_bytes, open_regular
from nvae_lightning.data.image_formats import open_image
from nvae_lightning.data.readers.base import (
    Source,
    Splits,
    Wanted,
    by_split,
    check_splits,
    from_pixels,
    require,
)
from nvae_lightning.data.readers.container import Container, Folder

_FILE = "data.mdb"
_HEADER = struct.Struct("=IIQQI")  # after a page's 16 bytes: magic, version, address, map, page
_MAGIC = 0xBEEFC0DE
_PAGE_SIZES = [2**n for n in range(9, 17)]
_MAX_MAP = 1 << 46  # bytes of address space, not of memory


class Database(Source):
    """Images of one LMDB database.

    Args:
        path: Folder of the database.

    Raises:
        ValueError: If it is unreadable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path) as transaction:
            # Keys that are not text survive a round trip through surrogates.
            keys = [os.fsdecode(bytes(key)) for key in transaction.cursor().iternext(values=False)]
            if all(key.isdecimal() for key in keys):
                keys.sort(key=int)
            super().__init__(keys)
            values = [_value(transaction, key) for key in keys[:16]]
            self.shape = _pixel_shape(values) if values else None

    def image(self, index: int) -> Image.Image:
        """Return an image."""
        with _reading(self.path) as transaction:
            value = _value(transaction, self.names[index])
        if self.shape is None:
            return open_image(value)
        return from_pixels(np.frombuffer(value, np.uint8).reshape(self.shape))


def find(container: Container, wanted: Wanted) -> Splits | None:
    """Find one database per split, for example ``train.lmdb`` and ``validation.lmdb``.

    Raises:
        ValueError: If a split is missing or duplicate, or a database is damaged.
    """
    if not isinstance(container, Folder):
        return None
    path = container.path
    files = [PurePosixPath(name) for name in container.names if PurePosixPath(name).name == _FILE]
    folders = [path / file.parent for file in files if len(file.parts) <= 2]
    if not folders:
        return None
    databases = by_split([(folder.stem, folder) for folder in folders], f"'{path}'")
    if not databases:
        raise ValueError(
            f"'{folders[0]}' does not name its split; name the databases "
            "train.lmdb and test.lmdb, and give the folder that they are in"
        )
    splits = check_splits(databases, f"'{path}'")
    read = {(folder / _FILE).relative_to(path).as_posix() for folder in splits.values()}
    locks = {str(PurePosixPath(name).with_name("lock.mdb")) for name in read}
    sources = {name: Database(folder) for name, folder in splits.items()}
    return Splits("LMDB", sources, container.unread(read | locks))


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a database for one read, because it must not be open twice or across a fork."""
    lmdb = require("lmdb", "lmdb")
    try:
        # LMDB trusts the page size and the map size, and may crash on them.
        with open_regular(path / _FILE) as file:
            header = file.read(_HEADER.size + 16)[16:]
        if len(header) < _HEADER.size:
            raise lmdb.CorruptedError("it has no header")
        magic, _, _, map_size, page_size = _HEADER.unpack(header)
        if magic != _MAGIC or page_size not in _PAGE_SIZES or map_size > _MAX_MAP:
            raise lmdb.CorruptedError("its header is not that of a database")
        with lmdb.open(str(path), readonly=True, lock=False, readahead=False) as environment:
            # LMDB maps the file into memory; a read beyond its end kills the process.
            size = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if (path / _FILE).stat().st_size < size:
                raise lmdb.CorruptedError(f"it is shorter than its {size:,} bytes")
            with environment.begin(buffers=True) as transaction:
                yield transaction
    except lmdb.Error as error:
        raise ValueError(
            f"'{path}' is a damaged LMDB database ({error}); fetch it again"
        ) from error


def _value(transaction: Any, key: str) -> bytes:  # noqa: ANN401
    """Return a value after checking its size.

    Raises:
        TooLargeError: If it is larger than an image may be.
    """
    value = transaction.get(os.fsencode(key))
    check_bytes(len(value))
    return bytes(value)


def _pixel_shape(values: Sequence[bytes]) -> tuple[int, int, int] | None:
    """Return the shape of raw square images; None if the values are image files."""
    length = len(values[0])
    if any(len(value) != length for value in values):
        return None
    try:
        open_image(values[0]).verify()
    except TooLargeError:
        return None
    except Exception:  # Pillow's decoders raise nearly any type
        for channels in (3, 1):
            side = math.isqrt(length // channels)
            if channels * side * side == length:
                return side, side, channels
    return None
