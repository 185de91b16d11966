"""Files in a folder, a zip or a tar archive, read alike."""

import os
import posixpath
import tarfile
import weakref
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Generic, TypeVar

Archive = TypeVar("Archive", zipfile.ZipFile, tarfile.TarFile)
Member = TypeVar("Member")

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


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
    def open(self, name: str) -> BufferedIOBase:
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
        return list(_visible(dict.fromkeys(found)))

    def open(self, name: str) -> BufferedIOBase:
        """Open a file for reading."""
        return (self.path / name).open("rb")


class _Archive(Container, Generic[Archive, Member]):
    """An archive, opened once by each process that reads it: a handle has one position."""

    _opened: tuple[int, Archive, dict[str, Member]] | None = None

    @abstractmethod
    def _open_archive(self) -> tuple[Archive, dict[str, Member]]:
        """Return the archive and its files, by whatever names."""

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}

    @property
    def archive(self) -> tuple[Archive, dict[str, Member]]:
        """The archive, open, and its files by their names.

        Raises:
            ValueError: If it is damaged.
        """
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                archive, members = self._open_archive()
            except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
                raise ValueError(
                    f"'{self.path}' is no whole archive ({error}); fetch it again"
                ) from error
            weakref.finalize(self, archive.close)
            self._opened = os.getpid(), archive, _visible(members)
        return self._opened[1:]

    def names(self) -> Sequence[str]:
        """Return the paths of all files."""
        return list(self.archive[1])


class Zip(_Archive[zipfile.ZipFile, zipfile.ZipInfo]):
    """A zip archive."""

    def _open_archive(self) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
        archive = zipfile.ZipFile(self.path)
        return archive, {info.filename: info for info in archive.infolist() if not info.is_dir()}

    def open(self, name: str) -> BufferedIOBase:
        """Open a file for reading."""
        archive, members = self.archive
        file = archive.open(members[name])
        assert isinstance(file, BufferedIOBase)  # a ZipExtFile, which the type does not say
        return file


class Tar(_Archive[tarfile.TarFile, tarfile.TarInfo]):
    """A tar archive that is not compressed: only such can be read at any place."""

    def _open_archive(self) -> tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]:
        archive = tarfile.open(self.path, "r:")
        try:
            members = {info.name: info for info in archive if info.isfile() or info.islnk()}
            with self.path.open("rb") as file:  # tarfile takes a damaged header for the end
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"damaged at byte {archive.offset}")
        except tarfile.TarError:
            archive.close()
            raise
        return archive, members

    def open(self, name: str) -> BufferedIOBase:
        """Open a file for reading."""
        archive, members = self.archive
        file = archive.extractfile(members[name])
        assert isinstance(file, BufferedIOBase)  # None only for folders
        return file


def open_container(path: Path) -> Container | None:
    """Return a folder, zip or tar as a container, and None for any other file.

    Raises:
        ValueError: If it is a compressed tar archive.
    """
    if path.is_dir():
        return Folder(path)
    suffixes = "".join(path.suffixes[-2:]).lower()
    if suffixes.endswith(_COMPRESSED):
        raise ValueError(f"'{path}' is compressed; uncompress it, or unpack it into a folder")
    if suffixes.endswith(".zip"):
        return Zip(path)
    return Tar(path) if suffixes.endswith(".tar") else None


def _visible(files: Mapping[str, Member]) -> dict[str, Member]:
    """Return files by name, in order and without a leading ``./``.

    What systems put beside people's files is left out: ``.DS_Store``, ``__MACOSX/`` and such.
    """
    hidden = (".", "__MACOSX")
    paths = {posixpath.normpath(name): file for name, file in files.items()}
    return {
        path: paths[path]
        for path in sorted(paths)
        if not any(part.startswith(hidden) for part in path.split("/"))
    }
