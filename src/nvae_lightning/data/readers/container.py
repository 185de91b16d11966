"""One interface to the files in a folder, a zip or a tar archive."""

import os
import posixpath
import stat
import tarfile
import weakref
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from nvae_lightning.data.files import open_regular, read_bounded
from nvae_lightning.data.summary import Outcome

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

_SPECIAL = "pipe, device or socket"
_OUTWARD = "link to outside"
_BROKEN = "link to nothing"
_NESTED = "link to a folder, in a linked folder or above itself"


class Listing(NamedTuple):
    """Contents of a container.

    Args:
        names: Sorted paths of its files, relative, separated by ``/``.
        left_out: Hidden files, links to outside, and entries that are not files.
    """

    names: Sequence[str]
    left_out: Sequence[Outcome]


class Container(ABC):
    """Files by name.

    Args:
        path: Folder, archive or file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    @abstractmethod
    def listing(self) -> Listing:
        """Contents, listed once."""

    @property
    def names(self) -> Sequence[str]:
        """Sorted paths of all files, relative, separated by ``/``."""
        return self.listing.names

    def unread(self, read: Collection[str], reasons: Mapping[str, str] = {}) -> list[Outcome]:
        """Return all entries except the files that are read.

        Args:
            read: Files that are read.
            reasons: Reasons not to read the others; by default their suffix.
        """
        ignored = [
            Outcome("", name, "ignored", reasons.get(name) or _suffix(name))
            for name in self.names
            if name not in read
        ]
        return [*self.listing.left_out, *ignored]

    @abstractmethod
    def open(self, name: str) -> BufferedIOBase:
        """Open a file for reading."""

    def read(self, name: str) -> bytes:
        """Return the contents of a file.

        Raises:
            ValueError: If it is larger than an image may be.
        """
        with self.open(name) as file:
            return read_bounded(file)


class File(Container):
    """A file that is not an archive."""

    @cached_property
    def listing(self) -> Listing:
        """The file itself."""
        return Listing([self.path.name], [])

    def open(self, name: str) -> BufferedIOBase:
        """Open the file for reading."""
        return open_regular(self.path)


class Folder(Container):
    """All files below a folder.

    Links to places below the folder are followed, but not from one linked folder to another.
    """

    @cached_property
    def listing(self) -> Listing:
        """All files, without what is hidden, special or linked from outside."""
        names: list[str] = []
        left_out: list[Outcome] = []
        root = os.path.realpath(self.path)
        folders = [("", False)]  # path below the root, and whether a link led there
        while folders:
            place, is_linked = folders.pop()
            with os.scandir(self.path / place) as entries:
                for entry in entries:
                    name = posixpath.join(place, entry.name)
                    if _is_hidden(entry.name):
                        left_out.append(Outcome("", name, "ignored", "hidden"))
                    elif entry.is_symlink() and (reason := _refused(entry.path, root, is_linked)):
                        left_out.append(Outcome("", name, "skipped", reason))
                    elif entry.is_dir():
                        folders.append((name, is_linked or entry.is_symlink()))
                    elif entry.is_file():
                        names.append(name)
                    else:
                        left_out.append(Outcome("", name, "skipped", _SPECIAL))
        return Listing(sorted(names), sorted(left_out, key=lambda file: file.image))

    def open(self, name: str) -> BufferedIOBase:
        """Open a file for reading."""
        return open_regular(self.path / name)


def _refused(link: str, root: str, is_linked: bool) -> str:
    """Return the reason not to follow a link, or an empty string."""
    target = Path(os.path.realpath(link))
    if not target.is_relative_to(root):
        return _OUTWARD
    if not os.path.exists(link):
        return _BROKEN
    above = os.path.realpath(os.path.dirname(link))
    if target.is_dir() and (is_linked or Path(above).is_relative_to(target)):
        return _NESTED
    return ""


class _Archive(Container):
    """An archive, opened once per process, because processes share a file handle's position."""

    _opened: tuple[int, Any, dict[str, Any], Listing] | None = None

    @abstractmethod
    def _open_archive(self) -> Any:  # noqa: ANN401
        """Open the archive."""

    @abstractmethod
    def _members(self, archive: Any) -> Iterator[tuple[str, Any, str]]:  # noqa: ANN401
        """Yield name and member of all entries but folders, and why not to read it, if so."""

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}

    @property
    def archive(self) -> tuple[Any, dict[str, Any], Listing]:
        """The open archive, its files by name, and its contents.

        Raises:
            ValueError: If it is damaged.
        """
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                archive = self._open_archive()
                weakref.finalize(self, archive.close)
                members, left_out = _sorted_out(self._members(archive))
            # zipfile and tarfile raise all of these for damaged headers.
            except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError) as error:
                raise ValueError(
                    f"'{self.path}' is a damaged archive ({error}); fetch it again"
                ) from error
            self._opened = os.getpid(), archive, members, Listing(list(members), left_out)
        return self._opened[1:]

    @cached_property
    def listing(self) -> Listing:
        """All regular files."""
        return self.archive[2]


class Zip(_Archive):
    """A zip archive."""

    def _open_archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def _members(self, archive: zipfile.ZipFile) -> Iterator[tuple[str, zipfile.ZipInfo, str]]:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if the system has none
            reason = "link in a zip" if kind == stat.S_IFLNK else _SPECIAL
            if not info.is_dir():
                yield info.filename, info, "" if kind in (0, stat.S_IFREG) else reason

    def open(self, name: str) -> BufferedIOBase:
        """Open a file for reading.

        Raises:
            ValueError: If its compression cannot be read in chunks.
        """
        archive, members, _ = self.archive
        method = members[name].compress_type
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"it is compressed by method {method}, which cannot be read in chunks; zip "
                "it again with the usual method, deflate"
            )
        return archive.open(members[name])


class Tar(_Archive):
    """An uncompressed tar archive, which allows random access."""

    def _open_archive(self) -> tarfile.TarFile:
        return tarfile.open(self.path, "r:")

    def _members(self, archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo, str]]:
        files = {}
        links = []
        position = -1
        for info in archive:
            if archive.offset <= position:  # a negative size would loop forever
                raise tarfile.ReadError(f"damaged at byte {position}")
            position = archive.offset
            if info.isfile():
                files[posixpath.normpath(info.name)] = info
                yield info.name, info, ""
            elif info.islnk() or info.issym():
                links.append(info)
            elif not info.isdir():
                yield info.name, info, _SPECIAL
        with open_regular(self.path) as file:  # tarfile mistakes a damaged header for the end
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged at byte {archive.offset}")
        for info in links:  # links to files in the archive are read
            folder = posixpath.dirname(info.name) if info.issym() else ""
            target = posixpath.normpath(posixpath.join(folder, info.linkname))
            outward = target.startswith(("..", "/"))
            reason = _OUTWARD if outward else "link to nothing in the archive"
            yield info.name, files.get(target, info), "" if target in files else reason

    def open(self, name: str) -> BufferedIOBase:
        """Open a file for reading."""
        archive, members, _ = self.archive
        return archive.extractfile(members[name])


def open_container(path: Path) -> Container:
    """Return a folder, a zip, a tar or any other file as a container.

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
    return Tar(path) if suffixes.endswith(".tar") else File(path)


def _suffix(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    return f"with suffix {suffix}" if suffix else "without a suffix"


def _sorted_out(members: Iterable[tuple[str, Any, str]]) -> tuple[dict[str, Any], list[Outcome]]:
    """Return the members to read, sorted by name, and the entries that are left out."""
    files: dict[str, Any] = {}
    left_out = []
    for raw, member, reason in members:
        name = posixpath.normpath(raw).lstrip("/")
        if reason:
            left_out.append(Outcome("", name, "skipped", reason))
        elif name.split("/")[0] == "..":
            left_out.append(Outcome("", name, "skipped", "name outside the archive"))
        elif any(map(_is_hidden, name.split("/"))):
            left_out.append(Outcome("", name, "ignored", "hidden"))
        else:
            if name in files:
                text = "replaced by a later file of the same name"
                left_out.append(Outcome("", name, "ignored", text))
            files[name] = member
    return {name: files[name] for name in sorted(files)}, left_out


def _is_hidden(part: str) -> bool:
    """Whether a name belongs to a system file, for example ``.DS_Store`` or ``__MACOSX``."""
    return part.startswith((".", "__MACOSX"))
