"""Files of ``torch.save``: whether they are whole, and why one cannot be read."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError

from nvae_lightning.utilities.plain_data import check_file

_AGAIN = "nothing in it was run: get the file again, from those who published it"


def damage(path: str | os.PathLike[str]) -> str | None:
    """Say what is damaged of an archive; None if nothing is.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    try:
        check_stored(Path(path))
        with zipfile.ZipFile(path) as archive:
            name = archive.testzip()
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile's own errors are of many kinds
        return str(error) or repr(error)
    return None if name is None else f"wrong checksum of {name}"


def check_stored(path: Path) -> None:
    """Check that an archive holds no more than its file, before any of it is read.

    A few compressed bytes, or members that share them, may become more than a machine's memory.
    PyTorch neither compresses nor shares, but reads what does.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is no regular file or holds more.
        zipfile.BadZipFile: if it is no archive.
    """
    check_file(path)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    is_compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if is_compressed or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members are compressed, which torch.save does not do")


def is_archive(path: Path) -> bool:
    """Whether PyTorch takes a file for an archive: by its first bytes."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def why_unreadable(path: Path, error: Exception) -> str:
    """Say why ``torch.load`` has not read a file; not in its own words, which advise to trust it.

    Args:
        path: the file.
        error: what was raised.
    """
    with path.open("rb") as file:
        head = file.read(16)
    is_zip, is_pickle = head.startswith(b"PK"), head.startswith(b"\x80")
    if is_zip or is_pickle:
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            return (
                f"asks for {forbidden[1]}, where only tensors, plain containers and "
                f"argparse.Namespace are read; {_AGAIN}"
            )
        if isinstance(error, UnpicklingError):
            return (
                "holds something else than tensors, plain containers and argparse.Namespace, or "
                f"is damaged; {_AGAIN}"
            )
        if is_zip and zipfile.is_zipfile(path):
            if type(error) is ValueError:
                return f"is damaged or not a checkpoint ({error}): give another file"
            return "is a zip archive without a readable PyTorch checkpoint: give another file"
        return "is truncated or is damaged: download it again"
    kinds = {
        b"\x89PNG": "a PNG image",
        b"\xff\xd8\xff": "a JPEG image",
        b"\x1f\x8b": "a gzip archive",
    }
    kind = next((kinds[magic] for magic in kinds if head.startswith(magic)), "of an unknown kind")
    if not head:
        kind = "empty"
    elif head[7:9] == b"\0{":
        kind = "a safetensors file, which holds no settings"
    elif head.isascii() and b"".join(head.split()).decode().isprintable():
        kind = "text"
    return f"is {kind}, not a PyTorch checkpoint: give a file that torch.save wrote"
