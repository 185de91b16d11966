"""Names of images as lines of text: whatever a name holds, it is one line and comes back."""

import re

# What would end a line somewhere, or is invisible, and the sign that stands before their numbers.
_ODD = re.compile(r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ESCAPE = re.compile(r"\\(\\|n|r|t|x[0-9a-f]{2}|u[0-9a-f]{4})")
_SHORT = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def escaped(name: str) -> str:
    r"""Return a name without control characters, by escapes as in Python: ``\n``, ``\x00``.

    Bytes that are no UTF-8 stay as the surrogates that they are in Python's file names.

    >>> escaped("a\nb"), escaped("a\\b"), escaped("größe 1.png")
    ('a\\nb', 'a\\\\b', 'größe 1.png')
    """
    return _ODD.sub(_escape, name)


def unescaped(line: str) -> str:
    r"""Return the name that `escaped` was given.

    >>> unescaped(escaped("a\r\n\x85\u2028\\n.png")) == "a\r\n\x85\u2028\\n.png"
    True
    """
    return _ESCAPE.sub(lambda match: _unescape(match[1]), line)


def printable(name: str) -> str:
    """Return a name that any terminal takes, for messages."""
    return escaped(name).encode("utf-8", "backslashreplace").decode("utf-8")


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def _unescape(code: str) -> str:
    if code[0] in "xu":
        return chr(int(code[1:], 16))
    return {"\\": "\\", "n": "\n", "r": "\r", "t": "\t"}[code]
