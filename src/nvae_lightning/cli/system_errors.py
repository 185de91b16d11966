"""What the system refuses (a full disk, a read-only folder, a name too long) in one line."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

_HINT = "HYDRA_FULL_ERROR=1 shows the traceback"
_SPACE = "free some space or write elsewhere"
_PERMISSION = "change its permissions or choose another path"
_SHORTER = "choose a shorter name"
_PATH = "check the path"
_SHARED_MEMORY = "shared memory"
_FEWER_WORKERS = "make room there, or leave out dataset.num_workers, which needs it"

_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "choose a path that can be written to",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENAMETOOLONG: _SHORTER,
    errno.ELOOP: _PATH,
    errno.ENOENT: _PATH,
    errno.ENOTDIR: _PATH,
    errno.EISDIR: _PATH,
    errno.EEXIST: _PATH,
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs or raise the system's limit on open files",
    errno.ENOMEM: "free some memory or use fewer workers",
}
#: Refusals by which libraries' errors of other types, too, are recognised.
_REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
#: What the compiler says of its cache: refusals, and libraries that were not written to the end.
_OF_CACHES = (*map(os.strerror, _REFUSALS), "file too short", "invalid ELF header")
_ONLY_IN_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def describe_system_error(error: BaseException | None, run_dir: str | None = None) -> str | None:
    """Describe an error that is the system's, or results from one; None for any other.

    Args:
        error: The error.
        run_dir: Folder of the run, where there is one.
    """
    if isinstance(error, OSError):
        return _describe(error, run_dir)
    if not isinstance(error, Exception) or isinstance(error, AssertionError):
        return None
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _REFUSALS:
            return _describe(cause, run_dir)
    text = str(error)
    if type(error).__module__.startswith("torch._inductor"):
        return _describe_compilation(text)
    if _SHARED_MEMORY in text:
        return f"{_last_line(error)}; {_FEWER_WORKERS}"
    # Libraries written in C++ or Rust keep only the text.
    for code in _REFUSALS:
        if os.strerror(code) in text:
            return f"{_last_line(error)}; {_REMEDIES[code]} ({_HINT})"
    return None


def _describe_compilation(text: str) -> str | None:
    """Describe what the compiler met in its cache; None for its other errors."""
    lines = [line for line in text.splitlines() if any(reason in line for reason in _OF_CACHES)]
    if not lines:
        return None
    return (
        f"compile=true: the compiler cannot use its cache ({lines[0].strip()}); free some space, "
        "delete the cache if it is damaged, or set the environment variable "
        "TORCHINDUCTOR_CACHE_DIR to another folder"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield what an error was raised from or while handling, the error itself left out."""
    seen = {id(error)}
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _describe(error: OSError, run_dir: str | None) -> str:
    if error.errno is None or error.strerror is None:  # a library's own, or one of a worker's
        return f"{_last_line(error)} ({_HINT})"
    reason = error.strerror
    remedy = _REMEDIES.get(error.errno)
    if not isinstance(error.filename, str | os.PathLike):
        if _is_of_multiprocessing(error):
            return f"cannot use /dev/shm, the {_SHARED_MEMORY} ({reason}); {_FEWER_WORKERS}"
        if run_dir and error.errno in _ONLY_IN_WRITING:
            reason += f" (the run's folder is '{run_dir}')"
        return f"{reason}; {remedy} ({_HINT})" if remedy else f"{reason} ({_HINT})"
    path = os.path.abspath(error.filename)
    name = _shorten(os.fspath(error.filename))
    if run_dir and _is_within(run_dir, path):
        return (
            f"hydra.run.dir: cannot make the folder '{name}' ({reason}); "
            "set hydra.run.dir=FOLDER to one that can be written to"
        )
    verb = "write" if error.errno in _ONLY_IN_WRITING else "use"
    if remedy is None:
        return f"cannot {verb} '{name}' ({reason}; {_HINT})"
    if run_dir and _is_within(path, run_dir):
        remedy += ", or set another hydra.run.dir=FOLDER"
    elif variable := _variable_of(path):
        remedy += f", or set the environment variable {variable} to another folder"
    return f"cannot {verb} '{name}' ({reason}); {remedy}"


def _is_within(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


def _is_of_multiprocessing(error: OSError) -> bool:
    """Whether an error is of a lock or queue between processes."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        frame.f_globals.get("__name__") == "multiprocessing.synchronize" for frame in frames
    )


def _variable_of(path: str) -> str | None:
    """Return the environment variable that names the innermost folder around a path."""
    folders = {
        name: os.path.abspath(value)
        for name, value in os.environ.items()
        if value and re.search(r"(DIR|HOME|CACHE)$", name)
    }
    around = [name for name, folder in folders.items() if _is_within(path, folder)]
    return max(around, key=lambda name: len(folders[name]), default=None)


def _last_line(error: BaseException) -> str:
    """Return what an error says: the end of it if it quotes the traceback of a worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if any("Traceback (most recent" in line for line in lines) else lines[0]


def _shorten(name: str) -> str:
    return name if len(name) <= 160 else f"{name[:80]}…{name[-60:]}"
