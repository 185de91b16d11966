"""The one error for data that torchvision can neither read nor download."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def explain_missing(name: str, files: str, folder: Path, hint: str) -> Iterator[None]:
    """Turn what torchvision raises inside the ``with`` into one line that says what to do.

    Args:
        name: The dataset's name.
        files: The files that torchvision reads.
        folder: Where they belong.
        hint: Another way to get the data, or an empty string.

    Raises:
        ValueError: If the files are missing or damaged and were not downloaded.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())  # torchvision's list of mirrors has many lines
        raise ValueError(
            f"dataset.root: no readable {name} in '{folder}' and no download ({reason}); "
            f"put {files} there" + (f", or {hint}" if hint else "")
        ) from error
