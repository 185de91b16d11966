"""Files of images in a folder, a zip or a tar, or in one archive per split."""

from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

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
from nvae_lightning.data.readers.container import Container, Folder, open_container
from nvae_lightning.data.summary import Outcome


class ImageFiles(Source):
    """Some image files of a container.

    Args:
        container: Container of the files.
        names: Paths of the files in the container.
    """

    def __init__(self, container: Container, names: Sequence[str]) -> None:
        super().__init__(names)
        self.container = container

    def image(self, index: int) -> Image.Image:
        """Return an image."""
        name = self.names[index]
        return open_image(self.container.read(name), name)


def find(container: Container, wanted: Wanted) -> Splits | None:
    """Find the image files of a container.

    The folders ``train`` and ``test`` (or ``val``, or ``valid``) are the splits where they exist,
    or else archives of these names. Otherwise a seeded part of all images is the test split.

    Raises:
        ValueError: If a split is missing or duplicate.
    """
    path, where = container.path, f"'{container.path}'"
    images = [name for name in container.names if is_image(name)]
    if folders := _split_folders(container, images):
        chosen = {}
        alternative = ", or rename the folder for a random split"
        for name, folder in check_splits(folders, where, alternative).items():
            chosen[name] = [image for image in images if image.startswith(f"{folder}/")]
    elif archives := _split_archives(container):
        opened = {name: open_container(path / archive) for name, archive in archives.items()}
        sources = {
            name: ImageFiles(archive, [file for file in archive.names if is_image(file)])
            for name, archive in opened.items()
        }
        left_out = _unread(container, archives.values())
        for name, archive in opened.items():
            left_out += [
                file._replace(image=f"{archives[name]}/{file.image}")
                for file in _unread(archive, sources[name].names)
            ]
        return Splits("archives of images", check_splits(sources, where), left_out)
    elif images:
        chosen = {k: [images[i] for i in v] for k, v in wanted.split(images, where).items()}
    else:
        return None
    sources = {name: ImageFiles(container, files) for name, files in chosen.items()}
    read = {name for files in chosen.values() for name in files}
    return Splits("image files", sources, _unread(container, read))


def _unread(container: Container, read: Collection[str]) -> list[Outcome]:
    images = filter(is_image, container.names)
    return container.unread(read, dict.fromkeys(images, "image beside the splits"))


def _split_archives(container: Container) -> dict[str, str]:
    archives = [name for name in container.names if name.lower().endswith((".zip", ".tar"))]
    named = [(PurePosixPath(name).stem, name) for name in archives]
    return by_split(named, f"'{container.path}'") if isinstance(container, Folder) else {}


def _split_folders(container: Container, images: Sequence[str]) -> dict[str, str]:
    """Return the folder of each split, at the top or below folders that contain everything."""
    folders = {PurePosixPath(image).parent for image in images}
    if isinstance(container, Folder):  # an empty split is an error
        skipped = {file.image for file in container.listing.left_out}
        folders |= {
            PurePosixPath(p.name)
            for p in container.path.iterdir()
            if p.name not in skipped and split_name(p.name) and p.is_dir()
        }
    place = PurePosixPath()
    while True:
        depth = len(place.parts)
        below = {folder.parts[depth] for folder in folders if len(folder.parts) > depth}
        named = [(name, str(place / name)) for name in sorted(below)]
        found = by_split(named, f"'{container.path}'")
        only_one = len(below) == 1 and all(len(folder.parts) > depth for folder in folders)
        if found or not only_one:
            return found
        place = place / below.pop()
