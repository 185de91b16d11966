"""Names of images as single lines of text that can be read back; errors in one line."""

import re

# Line ends, invisible characters, and the backslash that marks an escape.
_ODD = re.compile(r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ESCAPE = re.compile(r"\\(?:[\\nrt]|x[0-9a-f]{2}|u[0-9a-f]{4})")


def escaped(name: str) -> str:
    r"""Escape control characters as Python does: ``\n``, ``\x00``.

    Bytes that are not UTF-8 stay surrogates, as in Python's file names.

    >>> escaped("a\nb"), escaped("a\\b"), escaped("größe 1.png")
    ('a\\nb', 'a\\\\b', 'größe 1.png')
    """
    return _ODD.sub(lambda match: match[0].encode("unicode_escape").decode(), name)


def unescaped(line: str) -> str:
    r"""Invert `escaped`.

    >>> unescaped(escaped("a\r\n\x85\u2028\\n.png")) == "a\r\n\x85\u2028\\n.png"
    True
    """
    return _ESCAPE.sub(lambda match: match[0].encode().decode("unicode_escape"), line)


def printable(name: str) -> str:
    """Return a name that any terminal can print, for messages."""
    return escaped(name).encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(error: Exception) -> str:
    """Return the text of an error in one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
