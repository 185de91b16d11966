"""Files in a folder, a zip or a tar archive, read alike."""

import os
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Generic, TypeVar

Handle = TypeVar("Handle")


class Container(ABC):
    """Files by name.

    Args:
        path: Folder or archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Return the paths of all files, relative and with ``/``; hidden ones are left out."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""

    def read(self, name: str) -> bytes:
        """Return the contents of a file."""
        with self.open(name) as file:
            return file.read()


class Folder(Container):
    """All files below a folder."""

    def names(self) -> Sequence[str]:
        """Return the paths of all files."""
        found = []
        for folder, _, files in os.walk(self.path, followlinks=True):
            place = Path(folder).relative_to(self.path)
            found += [(place / file).as_posix() for file in files]
        return _visible(found)

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        return (self.path / name).open("rb")


class _Archive(Container, Generic[Handle]):
    """An archive, opened once by each process that reads it: a handle has one position."""

    _handle: tuple[int, Handle] | None = None

    @abstractmethod
    def _open_archive(self) -> Handle: ...

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}

    @property
    def archive(self) -> Handle:
        """The archive, open.

        Raises:
            ValueError: If it is damaged.
        """
        if self._handle is None or self._handle[0] != os.getpid():
            try:
                self._handle = os.getpid(), self._open_archive()
            except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
                raise ValueError(
                    f"'{self.path}' is no whole archive ({error}); fetch it again"
                ) from error
        return self._handle[1]


class Zip(_Archive[zipfile.ZipFile]):
    """A zip archive."""

    def _open_archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def names(self) -> Sequence[str]:
        """Return the paths of all files."""
        return _visible([info.filename for info in self.archive.infolist() if not info.is_dir()])

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        return self.archive.open(name)


class Tar(_Archive[tarfile.TarFile]):
    """A tar archive that is not compressed: only such can be read at any place."""

    def _open_archive(self) -> tarfile.TarFile:
        return tarfile.open(self.path, "r:")

    def names(self) -> Sequence[str]:
        """Return the paths of all files."""
        return _visible([info.name for info in self.archive.getmembers() if info.isfile()])

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        file = self.archive.extractfile(name)
        assert file is not None  # `names` has regular files only
        return file


def open_container(path: Path) -> Container | None:
    """Return a folder, zip or tar as a container, and None for any other file.

    Raises:
        ValueError: If it is a compressed tar archive.
    """
    if path.is_dir():
        return Folder(path)
    suffixes = "".join(path.suffixes[-2:]).lower()
    if suffixes.endswith((".tar.gz", ".tar.bz2", ".tar.xz", ".tgz")):
        raise ValueError(f"'{path}' is compressed; uncompress it, or unpack it into a folder")
    if suffixes.endswith(".zip"):
        return Zip(path)
    return Tar(path) if suffixes.endswith(".tar") else None


def _visible(names: list[str]) -> list[str]:
    """Leave out what systems put beside people's files: ``.DS_Store``, ``__MACOSX/`` and such."""
    hidden = (".", "__MACOSX")
    return sorted(
        name for name in names if not any(part.startswith(hidden) for part in name.split("/"))
    )
