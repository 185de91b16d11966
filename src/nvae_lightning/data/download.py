"""Downloads by torchvision, and the one error for those that fail."""

from collections.abc import Callable
from pathlib import Path


def download(name: str, files: str, folder: Path, fetch: Callable[[], object]) -> None:
    """Let torchvision download what is missing; remove the empty folders of a failed attempt.

    Args:
        name: Name of the dataset.
        files: The files that torchvision reads.
        folder: Folder that the files belong in.
        fetch: Function that downloads what is missing.

    Raises:
        ValueError: If files are missing or damaged and were not downloaded.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        fetch()
    except Exception as error:  # it asserts what it expects of files, and unpickles them
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        # torchvision's list of mirrors has many lines, an assertion none.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"dataset.root: no readable {name} in '{folder}' and no download ({reason}); "
            f"put {files} there"
        ) from error


def is_for_torchvision(root: Path, folder: Path) -> bool:
    """Whether torchvision may download to a root: nothing is there, or its folder is."""
    if root.is_dir():
        return folder.is_dir() or not any(root.iterdir())
    return not root.exists()
