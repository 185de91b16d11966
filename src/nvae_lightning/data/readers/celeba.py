"""CelebA as published and in torchvision's layout: aligned JPEGs and a partition file."""

from pathlib import PurePosixPath

from nvae_lightning.data.readers.base import SPLITS, Splits, Wanted
from nvae_lightning.data.readers.container import Container, Folder, Zip
from nvae_lightning.data.readers.image_files import ImageFiles

PARTITION = "list_eval_partition.txt"
IMAGES = "img_align_celeba"


def find(container: Container, wanted: Wanted) -> Splits | None:
    """Find CelebA's official split in a folder, with the images in a folder or a zip.

    Raises:
        ValueError: If images are missing, or the partition file is damaged.
    """
    partition = _named(container, PARTITION)
    if partition is None or not isinstance(container, Folder):
        return None
    path = container.path / partition
    images: Container = container
    names = [name for name in container.names if IMAGES in PurePosixPath(name).parts[:-1]]
    archive = _named(container, f"{IMAGES}.zip")
    if not names and archive is not None:
        images = Zip(container.path / archive)
        names = [*images.names]
    elif not names:
        raise ValueError(
            f"'{container.path}' has {PARTITION}, but no {IMAGES}.zip or folder {IMAGES}; add "
            "either"
        )
    by_name = {PurePosixPath(name).name: name for name in names}
    sources: dict[str, list[str]] = {name: [] for name in SPLITS}
    missing = []
    for line in container.read(partition).decode(errors="replace").splitlines():
        name, _, number = line.partition(" ")
        if number.strip() not in ("0", "1", "2"):
            raise ValueError(
                f"'{path}' has a line {line!r}, not an image and 0, 1 or 2; fetch the file again"
            )
        if name in by_name:
            sources[SPLITS[int(number)]].append(by_name[name])
        else:
            missing.append(name)
    if missing:
        raise ValueError(
            f"{len(missing):,} images that '{path}' names are not in '{images.path}', the first "
            f"being {missing[0]}; fetch {IMAGES}.zip again"
        )
    read = {partition, archive, *(name for files in sources.values() for name in files)}
    reasons = dict.fromkeys(by_name.values(), f"in no split of {PARTITION}")
    left_out = container.unread(read, reasons)
    if images is not container:
        left_out += images.unread(read, reasons)
    found = {name: ImageFiles(images, files) for name, files in sources.items()}
    return Splits("CelebA", found, left_out)


def _named(container: Container, name: str) -> str | None:
    return next((path for path in container.names if PurePosixPath(path).name == name), None)
