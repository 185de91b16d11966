"""Files of images: in a folder, a zip or a tar, or in one archive per split."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from PIL import Image

from nvae_lightning.data.image_formats import is_image, open_image
from nvae_lightning.data.readers.base import (
    Source,
    Splits,
    Wanted,
    by_split,
    check_splits,
    split_name,
)
from nvae_lightning.data.readers.container import Container, Folder, open_container, unread
from nvae_lightning.data.summary import Outcome


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
        name = self.names[index]
        return open_image(self.container.read(name), name)


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
    names, left_out = container.listing()
    images = [name for name in names if is_image(name)]
    left_out = unread((name for name in names if not is_image(name)), left_out)
    if folders := _split_folders(path, images, left_out):
        chosen = {}
        alternative = ", or rename what there is for a random split"
        for name, folder in check_splits(folders, f"'{path}'", alternative).items():
            chosen[name] = [image for image in images if image.startswith(f"{folder}/")]
            if not chosen[name]:
                raise ValueError(f"no images in '{path / folder}'; add some")
    elif archives := _split_archives(path, names):
        read = {name: _all_of(archive) for name, archive in archives.items()}
        sources = check_splits({name: files for name, (files, _) in read.items()}, f"'{path}'")
        paths = [archive.relative_to(path).as_posix() for archive in archives.values()]
        left_out = [file for file in left_out if file.image not in paths]
        inside = [file for name in read for file in read[name][1]]
        return Splits("archives of images", sources, [*left_out, *_beside(images, []), *inside])
    elif images:
        try:
            chosen = {k: [images[i] for i in v] for k, v in wanted.split(images).items()}
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from error
    else:
        return None
    sources = {name: ImageFiles(container, files) for name, files in chosen.items()}
    beside = _beside(images, [name for files in chosen.values() for name in files])
    return Splits("image files", sources, [*left_out, *beside])


def find_all(path: Path) -> Splits | None:
    """Find all image files of a folder or an archive, or the one that a path is, as a test split.

    None where there are none.
    """
    if path.is_file() and is_image(path.name):
        return Splits("image files", {"test": ImageFiles(Folder(path.parent), [path.name])})
    container = open_container(path)
    files, left_out = (None, []) if container is None else _all_in(container)
    return None if files is None else Splits("image files", {"test": files}, left_out)


def _split_archives(path: Path, names: Sequence[str]) -> dict[str, Path]:
    if not path.is_dir():
        return {}
    archives = [path / name for name in names if name.lower().endswith((".zip", ".tar"))]
    return by_split([(archive.stem, archive) for archive in archives], f"'{path}'")


def _split_folders(
    path: Path, images: Sequence[str], left_out: Sequence[Outcome]
) -> dict[str, str]:
    """Return the folder of each split, at the top or below folders that hold all the rest."""
    folders = {PurePosixPath(image).parent for image in images}
    if path.is_dir():  # an empty split is an error
        skipped = {file.image for file in left_out}
        folders |= {
            PurePosixPath(p.name)
            for p in path.iterdir()
            if p.name not in skipped and split_name(p.name) and p.is_dir()
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


def _all_of(archive: Path) -> tuple[ImageFiles, list[Outcome]]:
    container = open_container(archive)
    assert container is not None
    files, left_out = _all_in(container)
    if files is None:
        raise ValueError(f"no images in '{archive}'; add some")
    return files, [replace(one, image=f"{archive.name}/{one.image}") for one in left_out]


def _all_in(container: Container) -> tuple[ImageFiles | None, list[Outcome]]:
    names, left_out = container.listing()
    images = [name for name in names if is_image(name)]
    left_out = unread((name for name in names if not is_image(name)), left_out)
    return ImageFiles(container, images) if images else None, left_out


def _beside(images: Sequence[str], chosen: Sequence[str]) -> list[Outcome]:
    """Return the images that are in no split although there are splits."""
    others = set(images).difference(chosen)
    return [Outcome("", i, "ignored", "image beside the splits") for i in images if i in others]
