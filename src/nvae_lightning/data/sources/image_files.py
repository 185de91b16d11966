"""Files of images: in a folder, a zip or a tar, or in one archive per split."""

import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from nvae_lightning.data.sources.base import (
    Source,
    Splits,
    Wanted,
    by_split,
    check_splits,
    split_name,
)
from nvae_lightning.data.sources.container import Container, open_container

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)


class ImageFiles(Source):
    """Some image files of a container.

    Args:
        container: Where they are.
        names: Their paths in it.
    """

    def __init__(self, container: Container, names: Sequence[str]) -> None:
        super().__init__(names)
        self.container = container

    def image(self, index: int) -> Image.Image:
        """Return an image."""
        return Image.open(io.BytesIO(self.container.read(self.names[index])))


def find(path: Path, wanted: Wanted) -> Splits | None:
    """Find the image files of a folder or an archive.

    The folders ``train`` and ``test`` (or ``val``, or ``valid``) are the splits where they exist,
    or else archives of these names. Otherwise a seeded part of all images is the test split.

    Raises:
        ValueError: If there is half a split, an empty one, or one twice.
    """
    container = open_container(path)
    if container is None:
        return None
    names = container.names()
    images = _images(names)
    if folders := _split_folders(path, images):
        chosen = {}
        alternative = ", or rename what there is for a random split"
        for name, folder in check_splits(folders, f"'{path}'", alternative).items():
            chosen[name] = [image for image in images if image.startswith(f"{folder}/")]
            if not chosen[name]:
                raise ValueError(f"no images in '{path / folder}'; add some")
    elif archives := _split_archives(path, names):
        sources = {name: _all_of(archive) for name, archive in archives.items()}
        return Splits("archives of images", check_splits(sources, f"'{path}'"))
    elif images:
        try:
            chosen = {k: [images[i] for i in v] for k, v in wanted.split(images).items()}
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from error
    else:
        return None
    sources = {name: ImageFiles(container, files) for name, files in chosen.items()}
    return Splits("image files", sources)


def find_all(path: Path) -> ImageFiles | None:
    """Find all image files of a folder or an archive, or the one that a path is.

    None where there are none.
    """
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        folder = open_container(path.parent)
        return None if folder is None else ImageFiles(folder, [path.name])
    container = open_container(path)
    images = [] if container is None else _images(container.names())
    return None if container is None or not images else ImageFiles(container, images)


def _split_archives(path: Path, names: Sequence[str]) -> dict[str, Path]:
    if not path.is_dir():
        return {}
    archives = [path / name for name in names if name.lower().endswith((".zip", ".tar"))]
    return by_split([(archive.stem, archive) for archive in archives], f"'{path}'")


def _split_folders(path: Path, images: Sequence[str]) -> dict[str, str]:
    """Return the folder of each split, at the top or below folders that hold all the rest."""
    folders = {PurePosixPath(image).parent for image in images}
    if path.is_dir():  # an empty split is an error
        folders |= {
            PurePosixPath(p.name) for p in path.iterdir() if p.is_dir() and split_name(p.name)
        }
    place = PurePosixPath()
    while True:
        depth = len(place.parts)
        below = {folder.parts[depth] for folder in folders if len(folder.parts) > depth}
        found = by_split([(name, str(place / name)) for name in sorted(below)], f"'{path}'")
        only_one = len(below) == 1 and all(len(folder.parts) > depth for folder in folders)
        if found or not only_one:
            return found
        place = place / below.pop()


def _all_of(archive: Path) -> ImageFiles:
    container = open_container(archive)
    assert container is not None
    images = _images(container.names())
    if not images:
        raise ValueError(f"no images in '{archive}'; add some")
    return ImageFiles(container, images)


def _images(names: Sequence[str]) -> list[str]:
    return [name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES]
