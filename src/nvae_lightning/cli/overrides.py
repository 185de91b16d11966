"""Overrides of the command line: quoting and merging."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides.

    Raises:
        OverrideParseException: If one does not follow Hydra's grammar.
    """
    return OverridesParser.create().parse_overrides(list(overrides))


def how_to_write(override: str) -> str:
    """Say how to write an override that Hydra cannot parse.

    >>> print(how_to_write("ckpt_path=epoch=1.ckpt"))
    ckpt_path=epoch=1.ckpt: quote the value, for Hydra and the shell: 'ckpt_path="epoch=1.ckpt"'
    """
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override!r} is not a setting; write KEY=VALUE"
    return f"{override}: quote the value, for Hydra and the shell: {as_typed(key, value)}"


def as_typed(key: str, value: object) -> str:
    """Return an override as typed in a shell, quoted where Hydra or the shell requires it.

    >>> print(as_typed("hydra.run.dir", "/runs/1"), as_typed("hydra.run.dir", "/my runs"))
    hydra.run.dir=/runs/1 'hydra.run.dir="/my runs"'
    """
    if re.fullmatch(r"[\w./-]+", str(value), re.ASCII):
        return f"{key}={value}"
    escaped = str(value).replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')


def merge(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Put overrides before others, without those that the others replace.

    A setting that the first list adds remains an added one.

    >>> merge(["model=tiny", "+trainer.max_time=1", "~callbacks.wandb"], ["trainer.max_time=2"])
    ['model=tiny', '~callbacks.wandb', '++trainer.max_time=2']
    """
    earlier = {_key(override): override for override in parse(first)}
    later = parse(second)
    keys = {_key(override) for override in later}
    merged = [str(o.input_line) for key, o in earlier.items() if key not in keys]
    for override in later:
        before = earlier.get(_key(override))
        is_added = before is not None and (before.is_add() or before.is_force_add())
        is_plain = not (override.is_add() or override.is_force_add() or override.is_delete())
        plus = ("++" if "." in override.key_or_group else "+") if is_added and is_plain else ""
        merged.append(f"{plus}{override.input_line}")
    return merged


def _key(override: Override) -> tuple[str, str | None]:
    return override.key_or_group, override.package


def without_keys(overrides: Sequence[str], keys: Iterable[str]) -> list[str]:
    """Return overrides without some keys and without Hydra's own."""
    dropped = set(keys)
    return [
        str(o.input_line)
        for o in parse(overrides)
        if o.key_or_group not in dropped and not o.is_hydra_override()
    ]
