"""Where images come from: folders, archives and databases, as people have them.

`open_source` recognises the format. To add one, write a module with a function that takes a path
and returns a `Splits`, or None where it finds nothing of its own, and add it to `FORMATS`.
"""

from collections.abc import Callable
from pathlib import Path

from nvae_lightning.data.image_formats import suffixes
from nvae_lightning.data.names import printable
from nvae_lightning.data.readers import (
    celeba,
    image_files,
    lmdb_records,
    parquet,
    tfrecord,
    torchvision_files,
)
from nvae_lightning.data.readers.base import (
    SPLITS,
    ArraySource,
    SeededSplit,
    Source,
    Splits,
    Wanted,
)
from nvae_lightning.data.readers.container import open_container
from nvae_lightning.data.readers.parquet import HUB_PREFIX, from_hub

__all__ = [
    "HUB_PREFIX",
    "SPLITS",
    "ArraySource",
    "SeededSplit",
    "Source",
    "Splits",
    "Wanted",
    "every_image",
    "open_source",
]

#: In the order in which they are tried: the last takes any image it finds.
FORMATS: tuple[Callable[[Path, Wanted], Splits | None], ...] = (
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
        wanted: By what to choose where the source does not say.

    Raises:
        ValueError: If there is nothing, nothing known, or half a split.
    """
    if str(source).startswith(HUB_PREFIX):
        return _not_empty(from_hub(str(source), wanted), str(source))
    path = _existing(source)
    for find in FORMATS:
        splits = find(path, wanted)
        if splits is not None:
            return _not_empty(splits, str(path))
    container = open_container(path)
    names, left_out = ([path.name], ()) if container is None else container.listing()
    found = [printable(name) for name in (*names, *(file.image for file in left_out))]
    lost = ", ".join(sorted({file.reason for file in left_out if file.outcome == "skipped"}))
    raise ValueError(
        f"no images in '{path}' (which holds {', '.join(found[:5]) or 'nothing'}"
        f"{' and more' if len(found) > 5 else ''}{f'; not read: {lost}' if lost else ''}); what "
        f"is read: files with a suffix out of {', '.join(sorted(suffixes()))}, also in a zip or "
        "tar; torchvision's MNIST, CIFAR-10 and CelebA; TFRecords, parquet and LMDB"
    )


def every_image(source: str | Path) -> Splits:
    """Find all images of a folder, an archive or a file, as a test split; of others, their own.

    Raises:
        ValueError: If there are none.
    """
    path = _existing(source)
    files = image_files.find_all(path)
    if files is not None:
        return files
    any_split = SeededSplit(0.5, 0)  # such formats have splits of their own
    return open_source(path, Wanted(1, any_split))


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser().absolute()
    if not path.exists():
        raise ValueError(f"'{path}' does not exist")
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"'{path}' is neither a folder nor a regular file; give one of these")
    return path


def _not_empty(splits: Splits, where: str) -> Splits:
    for name, source in splits.sources.items():
        if not isinstance(source, ArraySource) and len(source) == 0:
            raise ValueError(f"no images in the split '{name}' of '{where}'; fetch it again")
    return splits
