"""Settings written by runs, read as plain YAML: nothing in them is resolved, imported or run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from nvae_lightning.utilities.plain_data import MOST_LEVELS, MOST_VALUES, check_plain, read_text


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the settings of a run.

    Raises:
        ValueError: If it is not a regular file, too large, not a mapping, or YAML with tags,
            anchors or too many levels.
    """
    try:
        content = yaml.load(read_text(path), _Loader)
        check_plain(content)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" at line {mark.line + 1}"
        raise ValueError(f"'{path}' is not plain YAML{place}") from error
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read ({error.strerror})") from error
    except ValueError as error:
        is_text = not isinstance(error, UnicodeDecodeError)
        reason = str(error) if is_text else "it is not text"
        raise ValueError(f"'{path}' does not hold the settings of a run: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' does not hold the settings of a run: it is not a mapping")
    return content


class _Loader(yaml.SafeLoader):
    """Loader of OmegaConf's YAML: no anchors, no dates, and numbers such as 1e-3."""

    level = num_values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401
        event: Any = self.peek_event()  # pyright: ignore[reportAttributeAccessIssue]
        if event.anchor is not None:
            raise ValueError("it has anchors")
        if self.level == MOST_LEVELS:
            raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
        self.num_values += 1
        if self.num_values > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values")
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if len(set(map(str, names))) < len(names):
            raise ValueError(f"it names a key twice, at line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
