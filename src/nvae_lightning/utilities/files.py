"""Files that are replaced atomically."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def unusable(error: OSError) -> str:
    """Describe a system's error about a file in one line."""
    return f"cannot use '{error.filename}' ({error.strerror})"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; the file then replaces `path`.

    After an error, such as a full disk, `path` is unchanged.

    Raises:
        OSError: If the file is not writable; its `filename` is `path`.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.filename in (None, str(partial), partial):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)


def check_not_deleted(folder: Path) -> None:
    """Check that the folder of a run still exists, so that it is not created again.

    Raises:
        ValueError: If it was deleted.
    """
    if folder.is_dir():
        return
    while not folder.parent.is_dir():
        folder = folder.parent
    raise ValueError(
        f"hydra.run.dir: '{folder}' was deleted while the run was writing to it; start the run "
        "again"
    )


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        OSError: If it is not writable.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
