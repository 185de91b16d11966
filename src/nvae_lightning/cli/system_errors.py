"""Errors of the operating system (a full disk, a read-only folder, a long name) as one line."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

_HINT = "HYDRA_FULL_ERROR=1 shows the traceback"
_SPACE = "free some space or choose another path"
_PERMISSION = "change its permissions or choose another path"

#: What to do about errors that say little by themselves.
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "choose a path that can be written to",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs or raise the system's limit on open files",
    errno.ENOMEM: "free some memory or set a smaller dataset.num_workers",
}
_ONLY_IN_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def describe_system_error(error: BaseException | None) -> str | None:
    """Describe an error of the system, or one that results from it; None for any other."""
    if isinstance(error, OSError):
        return _describe(error)
    if not isinstance(error, Exception) or isinstance(error, AssertionError):
        return None
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _REMEDIES:
            return _describe(cause)
    # Libraries in C++ or Rust keep only the text.
    for code, remedy in _REMEDIES.items():
        for line in str(error).splitlines():
            if os.strerror(code) in line:
                return f"{line.strip()}; {remedy} ({_HINT})"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors that an error was raised from, or while handling."""
    seen = {id(error)}
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _describe(error: OSError) -> str:
    if error.errno is None or error.strerror is None:  # of a library, or of a worker process
        return f"{_essence(error)} ({_HINT})"
    remedy = _REMEDIES.get(error.errno, "check the path")
    if not isinstance(error.filename, str | os.PathLike):
        return f"{error.strerror}; {remedy} ({_HINT})"
    if variable := _variable_of(os.path.abspath(error.filename)):
        remedy += f", or set the environment variable {variable} to another folder"
    name = os.fspath(error.filename)
    name = name if len(name) <= 160 else f"{name[:80]}…{name[-60:]}"
    verb = "write" if error.errno in _ONLY_IN_WRITING else "use"
    return f"cannot {verb} '{name}' ({error.strerror}); {remedy}"


def _variable_of(path: str) -> str | None:
    """Return the environment variable that names the innermost folder around a path."""
    folders = {
        name: os.path.abspath(value)
        for name, value in os.environ.items()
        if value and re.search(r"(DIR|CACHE)$", name)
    }
    around = [name for name, folder in folders.items() if Path(path).is_relative_to(folder)]
    return max(around, key=lambda name: len(folders[name]), default=None)


def _essence(error: BaseException) -> str:
    """Return the first line of a message; the last if it quotes the traceback of a worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if any("Traceback (most recent" in line for line in lines) else lines[0]
