"""Sources of images: folders, archives and databases.

`open_source` recognises the format. To add one, write a function that takes a `Container` and
returns a `Splits`, or None if the format is another, and add it to `FORMATS`.
"""

from collections.abc import Callable
from pathlib import Path

from nvae_lightning.data.image_formats import is_image, suffixes
from nvae_lightning.data.messages import printable
from nvae_lightning.data.readers import (
    celeba,
    image_files,
    lmdb_records,
    parquet,
    tfrecord,
    torchvision_files,
)
from nvae_lightning.data.readers.base import SPLITS, ArraySource, Source, Splits, Wanted
from nvae_lightning.data.readers.container import Container, open_container
from nvae_lightning.data.readers.parquet import HUB_PREFIX, from_hub

__all__ = [
    "HUB_PREFIX",
    "SPLITS",
    "ArraySource",
    "Source",
    "Splits",
    "Wanted",
    "every_image",
    "open_source",
]

#: In the order of trial; the last accepts any image files.
FORMATS: tuple[Callable[[Container, Wanted], Splits | None], ...] = (
    lmdb_records.find,
    torchvision_files.find,
    celeba.find,
    tfrecord.find,
    parquet.find,
    image_files.find,
)


def open_source(source: str | Path, wanted: Wanted) -> Splits:
    """Find the images of a folder, an archive, a database, or a dataset of the Hugging Face hub.

    Args:
        source: A path, or ``hf://owner/name``.
        wanted: Settings that select the images of the source.

    Raises:
        ValueError: If the source does not exist, has no known format, or lacks a split.
    """
    if str(source).startswith(HUB_PREFIX):
        return _not_empty(from_hub(str(source), wanted), str(source))
    container = _existing(source)
    path = container.path
    for find in FORMATS:
        splits = find(container, wanted)
        if splits is not None:
            return _not_empty(splits, str(path))
    names, left_out = container.listing
    found = [printable(name) for name in (*names, *(file.image for file in left_out))]
    lost = ", ".join(sorted({file.reason for file in left_out if file.outcome == "skipped"}))
    raise ValueError(
        f"no images in '{path}' (which holds {', '.join(found[:5]) or 'nothing'}"
        f"{' and more' if len(found) > 5 else ''}{f'; not read: {lost}' if lost else ''}); give "
        f"files with one of the suffixes {', '.join(sorted(suffixes()))}, a zip or tar of them, "
        "torchvision's MNIST, CIFAR-10 and CelebA; TFRecords, parquet and LMDB"
    )


def every_image(source: str | Path) -> Splits:
    """Find all image files of a source as a test split; other formats have their own splits.

    Raises:
        ValueError: If there are none.
    """
    container = _existing(source)
    images = [name for name in container.names if is_image(name)]
    if not images:
        return open_source(source, Wanted(1, 0.5, 0))
    files = image_files.ImageFiles(container, images)
    return Splits("image files", {"test": files}, container.unread({*images}))


def _existing(source: str | Path) -> Container:
    path = Path(source).expanduser().absolute()
    if not path.exists():
        raise ValueError(f"'{path}' does not exist")
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"'{path}' is neither a folder nor a regular file; give one of these")
    return open_container(path)


def _not_empty(splits: Splits, where: str) -> Splits:
    for name, source in splits.sources.items():
        if len(source) == 0:
            raise ValueError(
                f"no images in the split '{name}' of '{where}'; fetch it again, or add some"
            )
    return splits
