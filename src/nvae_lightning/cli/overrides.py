"""Overrides of the command line: how to quote them, and one list out of two."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides.

    Raises:
        OverrideParseException: If one does not follow Hydra's grammar.
    """
    return OverridesParser.create().parse_overrides(list(overrides))


def how_to_quote(override: str) -> str | None:
    """Write an override so that its value is the text after the first ``=``, quoted for a shell.

    A list stays a list, of texts.

    Returns:
        The override; None if Hydra cannot express it.

    >>> print(how_to_quote("ckpt_path=epoch=1.ckpt"))
    'ckpt_path="epoch=1.ckpt"'
    """
    key, equals, value = override.partition("=")
    if not equals:
        return None
    expected: object = value
    if value.startswith("[") and value.endswith("]") and value != "[]":
        expected = [item.strip() for item in value[1:-1].split(",")]
        candidates = [
            f"{key}=[{','.join(quoted)}]"
            for quoted in zip(*(_quoted(item) for item in expected), strict=True)
        ]
        candidates += [f"{key}={one}" for one in _quoted(value)]
    else:
        candidates = [f"{key}={one}" for one in _quoted(value)]
    for candidate in candidates:
        try:
            (parsed,) = parse([candidate])
        except HydraException:
            continue
        if parsed.value() in (expected, value):
            return shlex.quote(candidate)
    return None


def _quoted(value: str) -> list[str]:
    """Write a text between either kind of quotes, with the same quotes in it escaped."""
    found = []
    for quote in "\"'":
        escaped = re.sub(rf"(\\*)({quote})", r"\1\1\\\2", value)
        trailing = len(escaped) - len(escaped.rstrip("\\"))
        found.append(f"{quote}{escaped}{chr(92) * trailing}{quote}")
    return found


def merge(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Put overrides in front of others, without those whose keys the others set.

    A key that the first ones add stays one that is added.

    >>> merge(["model=tiny", "+trainer.max_time=1", "~callbacks.wandb"], ["trainer.max_time=2"])
    ['model=tiny', '~callbacks.wandb', '++trainer.max_time=2']
    """
    earlier = {_key(override): override for override in parse(first)}
    later = parse(second)
    keys = {_key(override) for override in later}
    kept = [str(o.input_line) for key, o in earlier.items() if key not in keys]
    for override in later:
        line = str(override.input_line)
        before = earlier.get(_key(override))
        is_plain = not (override.is_add() or override.is_force_add() or override.is_delete())
        if is_plain and before is not None and (before.is_add() or before.is_force_add()):
            is_group = "." not in override.key_or_group
            line = f"+{line}" if is_group else f"++{line}"
        kept.append(line)
    return kept


def _key(override: Override) -> tuple[str, str | None]:
    return override.key_or_group, override.package


def without_keys(overrides: Sequence[str], keys: Iterable[str]) -> list[str]:
    """Drop overrides of some keys, and Hydra's own."""
    dropped = set(keys)
    return [
        str(o.input_line)
        for o in parse(overrides)
        if o.key_or_group not in dropped and not o.is_hydra_override()
    ]
