"""Errors of the operating system (a full disk, a read-only folder, a long name) as one line."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

_HINT = "HYDRA_FULL_ERROR=1 shows the traceback"
_SPACE = "free some space or choose another path"
_PERMISSION = "change its permissions or choose another path"

#: Remedies for errors whose own text says little.
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


def describe_system_error(error: BaseException | None) -> str | None:
    """Describe an error of the system, or one that results from it; None for any other."""
    if isinstance(error, OSError):
        return _describe(error)
    if not isinstance(error, Exception) or isinstance(error, AssertionError):
        return None
    cause: BaseException | None = error
    while (cause := cause.__cause__ or cause.__context__) is not None:
        if isinstance(cause, OSError) and cause.errno in _REMEDIES:
            return _describe(cause)
    # Libraries in C++ or Rust keep only the text.
    for code, remedy in _REMEDIES.items():
        for line in str(error).splitlines():
            if os.strerror(code) in line:
                return f"{line.strip()}; {remedy} ({_HINT})"
    return None


def _describe(error: OSError) -> str:
    if error.errno is None or error.strerror is None:  # of a library, or of a worker process
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        is_worker = any("Traceback (most recent" in line for line in lines)
        essence = lines[-1 if is_worker else 0] if lines else type(error).__name__
        return f"{essence} ({_HINT})"
    remedy = _REMEDIES.get(error.errno, "check the path")
    if not isinstance(error.filename, str | os.PathLike):
        return f"{error.strerror}; {remedy} ({_HINT})"
    if variable := _variable_of(os.path.abspath(error.filename)):
        remedy += f", or set the environment variable {variable} to another folder"
    name = os.fspath(error.filename)
    name = name if len(name) <= 160 else f"{name[:80]}…{name[-60:]}"
    return f"cannot use '{name}' ({error.strerror}); {remedy}"


def _variable_of(path: str) -> str | None:
    """Return the environment variable that names the innermost folder around a path."""
    folders = {
        name: os.path.abspath(value)
        for name, value in os.environ.items()
        if value and re.search(r"(DIR|CACHE)$", name)
    }
    around = [name for name, folder in folders.items() if Path(path).is_relative_to(folder)]
    return max(around, key=lambda name: len(folders[name]), default=None)
