"""Checksums of zip archives, which PyTorch writes and does not compare."""

from __future__ import annotations

import os
import zipfile


def damage(path: str | os.PathLike[str]) -> str | None:
    """Say what is damaged of an archive; None if nothing is.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = archive.testzip()
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile's own errors are of many kinds
        return str(error) or repr(error)
    return None if name is None else f"wrong checksum of {name}"
