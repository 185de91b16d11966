"""Plain data from files that anybody may have written: of bounded size, and checked before use."""

from __future__ import annotations

import inspect
import json
import math
import os
import reprlib
import stat
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

#: Bytes of a text file; the largest that this package writes has a few thousand.
MOST_BYTES = 1 << 18

#: What plain data may hold: a config has a few hundred values, nested half as deeply.
MOST_VALUES = 20_000
MOST_LEVELS = 16

_LARGEST = 1 << 63
_SCALARS = (str, int, float, bool, NoneType)


def check_file(path: str | Path) -> None:
    """Check that a path is a regular file that fits into this machine's memory.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is something else, such as a folder, a device or a pipe, or too large.
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
        OSError: if there is no such file.
        ValueError: if it is no regular file, too large, or not text.
    """
    check_file(path)  # opening a pipe would wait for whoever writes to it
    with Path(path).open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return content.decode()


def read_json(path: str | Path) -> Any:  # noqa: ANN401
    """Read a small JSON file; :func:`check_plain` checks what it holds.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is no such file, no JSON, or names a key twice.
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
        ValueError: if they hold anything else, more than a description of a model or the settings
            of a training could, or a number that is not finite or beyond 64 bits.
    """
    pending: list[tuple[Any, int]] = [(value, 1)]
    num_values = 1
    while pending:
        item, level = pending.pop()
        if isinstance(item, dict | list | tuple):
            num_values += len(item)  # shared ones count each time: few may look like very many
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


def fits(value: object, annotation: object) -> bool:
    """Whether a value is of the type that a parameter is annotated with.

    Only plain data are looked at: what else there is is known when something is built of it.

    >>> from collections.abc import Sequence
    >>> fits([1, 2], Sequence[int]), fits("1", int), fits(None, int | None), fits(True, int)
    (True, False, True, False)
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (Any, object, inspect.Parameter.empty):
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if annotation is None or annotation is NoneType:
        return value is None
    if annotation is float:
        return type(value) in (int, float) and abs(value) < math.inf  # pyright: ignore
    if annotation in (int, bool, str):
        return type(value) is annotation
    if isinstance(value, list | dict):
        kind = origin or annotation
        if not isinstance(kind, type) or kind in (str, bytes):
            return False
        if isinstance(value, dict):
            types = arguments or (Any, Any)
            return issubclass(dict, kind) and all(fits(v, types[-1]) for v in value.values())
        if kind is tuple and arguments and arguments[-1] is not ...:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return (kind is tuple or issubclass(list, kind)) and all(
            fits(item, arguments[0] if arguments else Any) for item in value
        )
    return not isinstance(value, _SCALARS)


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 100


def shown(value: object) -> str:
    """Write a file's value in an error: without control characters, a long one abridged."""
    return _Shown().repr(value)
