"""Settings written by runs, read as plain YAML: nothing in them is resolved, imported or run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from nvae_lightning.utilities.plain_data import check_plain, read_text


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the settings of a run.

    Raises:
        ValueError: If the file is not a regular one, is too large, does not hold a mapping, or is
            YAML with tags, anchors or more nesting than settings have.
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
    except (ValueError, RecursionError) as error:
        is_text = not isinstance(error, UnicodeDecodeError)
        reason = str(error) if is_text else "it is not text"
        raise ValueError(f"'{path}' does not hold the settings of a run: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' does not hold the settings of a run: it is not a mapping")
    return content


class _Loader(get_yaml_loader()):
    """OmegaConf's loader, without anchors, whose merging could multiply a small file."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401
        if self.peek_event().anchor is not None:
            raise ValueError("it has anchors")
        return super().compose_node(parent, index)
