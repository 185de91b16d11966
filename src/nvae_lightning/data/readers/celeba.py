"""CelebA as it is published and as torchvision lays it out: aligned JPEGs and a partition file."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from nvae_lightning.data.files import read_regular
from nvae_lightning.data.readers.base import SPLITS, Splits, Wanted
from nvae_lightning.data.readers.container import Container, Folder, Zip, unread
from nvae_lightning.data.readers.image_files import ImageFiles
from nvae_lightning.data.summary import Outcome

PARTITION = "list_eval_partition.txt"
IMAGES = "img_align_celeba"


def find(path: Path, wanted: Wanted) -> Splits | None:
    """Find CelebA's official split in a folder, its images in a folder or a zip.

    Raises:
        ValueError: If images are missing, or the partition file is damaged.
    """
    if not path.is_dir():
        return None
    files, left_out = Folder(path).listing()
    lists = [name for name in files if PurePosixPath(name).name == PARTITION]
    if not lists:
        return None
    container, by_name = _images(path, files)
    sources: dict[str, list[str]] = {name: [] for name in SPLITS}
    missing = []
    text = read_regular(path / lists[0]).decode(errors="replace")
    for line in text.splitlines():
        name, _, number = line.partition(" ")
        if number.strip() not in ("0", "1", "2"):
            raise ValueError(
                f"'{path / lists[0]}' has a line {line!r}, not an image and 0, 1 or 2; "
                "fetch the file again"
            )
        if name in by_name:
            sources[SPLITS[int(number)]].append(by_name[name])
        else:
            missing.append(name)
    if missing:
        raise ValueError(
            f"{len(missing):,} images that '{path / lists[0]}' names are not in "
            f"'{container.path}', the first being {missing[0]}; fetch {IMAGES}.zip again"
        )
    taken = {name for images in sources.values() for name in images}
    others = [name for name in by_name.values() if name not in taken]
    images = [Outcome("", name, "ignored", f"in no split of {PARTITION}") for name in others]
    known = {PARTITION, f"{IMAGES}.zip"}
    rest = [
        name
        for name in files
        if IMAGES not in PurePosixPath(name).parts[:-1] and PurePosixPath(name).name not in known
    ]
    return Splits(
        "CelebA",
        {name: ImageFiles(container, images) for name, images in sources.items()},
        [*unread(rest, left_out), *images],
    )


def _images(path: Path, files: Sequence[str]) -> tuple[Container, dict[str, str]]:
    container: Container = Folder(path)
    names = [name for name in files if IMAGES in PurePosixPath(name).parts[:-1]]
    if not names:
        archives = [name for name in files if PurePosixPath(name).name == f"{IMAGES}.zip"]
        if not archives:
            raise ValueError(
                f"'{path}' has {PARTITION}, but no {IMAGES}.zip or folder {IMAGES}; add either"
            )
        container = Zip(path / archives[0])
        names = list(container.names())
    return container, {PurePosixPath(name).name: name for name in names}
