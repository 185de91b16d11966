"""Safe reading of untrusted files: only regular files, up to a maximum size."""

import os
import stat
from io import BufferedIOBase, BufferedReader, BytesIO
from pathlib import Path

MAX_BYTES = 256 << 20  # of one image, encoded or as raw pixels
_BLOCK = 1 << 20


class TooLargeError(ValueError):
    """Error for an image that would take too much memory."""


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file, or a link to one, for reading.

    Raises:
        ValueError: If it is a pipe, a device, a socket or a folder.
        OSError: If it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"'{path}' is not a regular file; remove it")
    return os.fdopen(descriptor, "rb")


def read_bounded(file: BufferedIOBase, limit: int | None = None) -> bytes:
    """Return the rest of a file, whatever its declared size.

    Raises:
        TooLargeError: If it is larger than the limit.
    """
    content = BytesIO()
    while block := file.read(_BLOCK):  # archives buffer twice the requested size
        content.write(block)
        check_bytes(content.tell(), limit)
    return content.getvalue()


def check_bytes(size: int, limit: int | None = None) -> None:
    """Check a size against a limit, by default that of one image.

    Raises:
        TooLargeError: If it is larger.
    """
    most = MAX_BYTES if limit is None else limit
    if size > most:
        raise TooLargeError(f"it is larger than {most:,} bytes, the limit")


def read_regular(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """Return the contents of a regular file.

    Raises:
        ValueError: If it is not regular, or larger than the limit.
        OSError: If it cannot be read.
    """
    with open_regular(path) as file:
        return read_bounded(file, limit)


def leads_out(path: Path, root: Path) -> bool:
    """Whether a path leads out of a folder through a link."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
