"""Texts of one line: names of images, and errors that name the setting they are about."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# Line ends, invisible characters, and the backslash that marks an escape.
_ODD = re.compile(r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029]")


def escaped(name: str) -> str:
    r"""Escape control characters as Python does: ``\n``, ``\x00``.

    Bytes that are not UTF-8 stay surrogates, as in Python's file names.

    >>> escaped("a\nb"), escaped("a\\b"), escaped("größe 1.png")
    ('a\\nb', 'a\\\\b', 'größe 1.png')
    """
    return _ODD.sub(lambda match: match[0].encode("unicode_escape").decode(), name)


def printable(name: str) -> str:
    """Return a name that any terminal can print."""
    return escaped(name).encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(error: Exception) -> str:
    """Return the text of an error in one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Put the name of a setting before errors that do not name one."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(("dataset.", "source: ")):
            raise
        raise ValueError(f"{setting}: {error}") from error
    except OSError as error:
        name = "" if error.filename is None else f" '{printable(str(error.filename))}'"
        raise ValueError(f"{setting}: cannot read{name} ({error.strerror or error})") from error
