"""Plain data from untrusted files: limited in size and checked before use."""

from __future__ import annotations

import inspect
import json
import math
import os
import reprlib
import stat
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

#: Maximum bytes of a text file; this package writes at most a few thousand.
MOST_BYTES = 1 << 18

#: Limits of plain data; a config has a few hundred values, nested half as deeply.
MOST_VALUES = 20_000
MOST_LEVELS = 16

_LARGEST = 1 << 63
_SCALARS = (str, int, float, bool, NoneType)


def check_file(path: str | Path) -> None:
    """Check that a path is a regular file that fits into this machine's memory.

    Raises:
        OSError: If the file does not exist.
        ValueError: If it is something else, for example a folder or a pipe, or too large.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    memory = _memory()
    if found.st_size > memory:
        raise ValueError(
            f"it takes {found.st_size / 1e9:,.0f} GB, more than this machine's memory of "
            f"{memory / 1e9:,.0f} GB"
        )


def _memory() -> int | float:
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_text(path: str | Path) -> str:
    """Read a small text file.

    Raises:
        OSError: If the file does not exist.
        ValueError: If it is not a regular file, too large, or not text.
    """
    check_file(path)  # opening a pipe would wait for a writer
    with Path(path).open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return content.decode()


def read_json(path: str | Path) -> Any:  # noqa: ANN401
    """Read a small JSON file; check its content with :func:`check_plain`.

    Raises:
        OSError: If the file does not exist.
        ValueError: If it is not a regular file or not JSON, or names a key twice.
    """
    try:
        return json.loads(read_text(path), object_pairs_hook=_mapping)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {shown(twice)} twice")
    return mapping


def check_plain(value: object) -> None:
    """Check that data are mappings and lists of text, numbers, flags and nulls, and not too many.

    Raises:
        ValueError: If they hold anything else, more than a description of a model or the settings
            of a training could, or a number that is not finite or beyond 64 bits.
    """
    pending: list[tuple[Any, int]] = [(value, 1)]
    num_values = 1
    while pending:
        item, level = pending.pop()
        if isinstance(item, dict | list | tuple):
            num_values += len(item)  # shared values count each time, as they may expand
            if num_values > MOST_VALUES:
                raise ValueError(f"it holds more than {MOST_VALUES:,} values")
            if level > MOST_LEVELS:
                raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
            if isinstance(item, dict):
                if other := [key for key in item if type(key) is not str]:
                    raise ValueError(f"it has the key {shown(other[0])}, which is not text")
                item = item.values()
            pending += [(child, level + 1) for child in item]
        elif type(item) not in _SCALARS:
            raise ValueError(f"it holds a {type(item).__name__}, which is not plain data")
        elif isinstance(item, int | float) and not abs(item) <= _LARGEST:
            raise ValueError(f"it holds the number {shown(item)}, not finite or beyond 64 bits")


@cache
def _adapter(annotation: Any) -> Any:  # noqa: ANN401 -- beartype does not know TypeAdapter
    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return TypeAdapter(list[annotation], config=config)  # pyright: ignore[reportInvalidTypeForm]


def misfit(value: object, annotation: object) -> str | None:
    """Say what plain data must be instead, by a parameter's annotation; None if they fit.

    Other objects, and what is built from a ``_target_``, are not looked at.

    >>> from collections.abc import Sequence
    >>> misfit([1, 2], Sequence[int]), misfit("1", int), misfit(True, int | None)
    (None, 'a valid integer', 'a valid integer')
    """
    if annotation is inspect.Parameter.empty:
        return None
    try:
        _adapter(annotation).validate_json(json.dumps([value]))
    except ValidationError as error:
        kinds = {
            fault["msg"].removeprefix("Input should be "): None
            for fault in error.errors()
            if fault["type"] not in ("needs_python_object", "callable_type")
        }
        return " or ".join(kinds) or "built from a _target_"
    except (TypeError, PydanticUserError):  # not plain data, or an annotation of another library
        return None
    return None


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 100


def shown(value: object) -> str:
    """Format a file's value for an error: without control characters, shortened if long."""
    return _Shown().repr(value)
