"""Files that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, which then takes its place.

    After an error, such as that of a full disk, `path` is what it was before.

    Raises:
        OSError: If it cannot be written. It names `path`, which errors of writing do not.
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
    """Check that a folder that a run has made is still there; it is not made a second time.

    Raises:
        ValueError: If it is not.
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
    """Write a text file.

    Raises:
        OSError: If it cannot be written.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
