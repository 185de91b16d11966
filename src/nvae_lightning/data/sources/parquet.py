"""Parquet shards as the Hugging Face hub publishes images, local or by name."""

import glob
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from nvae_lightning.data.sources.base import (
    Source,
    Splits,
    Wanted,
    check_splits,
    split_name,
)
from nvae_lightning.data.sources.container import Folder
from nvae_lightning.data.sources.optional import require

HUB_PREFIX = "hf://"


class Table(Source):
    """Some rows of a table with a column of images.

    Args:
        table: A ``datasets.Dataset`` whose column `column` holds encoded images.
        column: Name of the column.
        rows: Which rows.
    """

    def __init__(self, table: Any, column: str, rows: Sequence[int]) -> None:  # noqa: ANN401
        super().__init__([f"{row:08d}" for row in rows])
        self.table = table
        self.column = column
        self.rows = rows

    def image(self, index: int) -> Image.Image:
        """Return an image.

        Raises:
            ValueError: If the row has none.
        """
        value = self.table[self.rows[index]][self.column]
        if isinstance(value, dict):  # the hub's folders of images have a path only
            value = value["bytes"] or (value.get("path") and Path(value["path"]).read_bytes())
        if not value:
            raise ValueError(f"row {self.rows[index]} has no image in its column '{self.column}'")
        return Image.open(io.BytesIO(value))


def find(path: Path, wanted: Wanted) -> Splits | None:
    """Find the shards of a folder, or take one file.

    Raises:
        ValueError: If they cannot be read, hold no images, or half a split.
    """
    files = [path] if path.is_file() else [path / name for name in Folder(path).names()]
    shards = [file for file in files if file.suffix.lower() == ".parquet"]
    if not shards:
        return None
    by_split: dict[str, list[str]] = {}
    for shard in shards:
        file = shard.name.partition("-")[0].partition(".")[0]
        name = split_name(file) or split_name(shard.parent.name) or "train"
        by_split.setdefault(name, []).append(glob.escape(str(shard)))
    return _load(str(path), wanted, "parquet", data_files=by_split)


def from_hub(name: str, wanted: Wanted) -> Splits:
    """Load a dataset of the hub, given as ``hf://owner/name``.

    Raises:
        ValueError: If it cannot be had, holds no images, or half a split.
    """
    return _load(name, wanted, name.removeprefix(HUB_PREFIX).removeprefix("datasets/"))


def _load(where: str, wanted: Wanted, *arguments: str, **options: object) -> Splits:
    datasets = require("datasets", "parquet")
    try:
        tables = datasets.load_dataset(*arguments, **options)
    except Exception as error:  # the package's own errors, pyarrow's, and those of three networks
        reasons = ": ".join(str(e) for e in (error, error.__cause__) if e is not None)
        reason = " ".join(reasons.split())
        remedy = (
            "check its name and the network" if where.startswith(HUB_PREFIX) else "fetch it again"
        )
        raise ValueError(f"'{where}' cannot be read as a dataset ({reason}); {remedy}") from error
    by_split = {name: table for key, table in tables.items() if (name := split_name(key))}
    if not by_split:
        raise ValueError(f"'{where}' has no split 'train', but {', '.join(tables)}; name another")
    if set(by_split) == {"train"}:  # nothing is held out
        table, column = _with_images(by_split["train"], where)
        try:
            rows = wanted.split([f"{row:08d}" for row in range(len(table))])
        except ValueError as error:
            raise ValueError(f"'{where}': {error}") from error
        sources = {name: Table(table, column, chosen) for name, chosen in rows.items()}
        return Splits("parquet", sources)
    sources = {}
    for name, part in check_splits(by_split, f"'{where}'").items():
        table, column = _with_images(part, where)
        sources[name] = Table(table, column, range(len(table)))
    return Splits("parquet", sources)


def _with_images(table: Any, where: str) -> tuple[Any, str]:  # noqa: ANN401
    """Find the column of images, and keep it from being decoded: a decoder does that."""
    datasets = require("datasets", "parquet")
    for column, feature in table.features.items():
        is_image = isinstance(feature, datasets.Image)
        is_struct = isinstance(feature, dict) and "bytes" in feature
        if is_image or is_struct or getattr(feature, "dtype", "") in ("binary", "large_binary"):
            table = table.select_columns([column])
            decoded = datasets.Image(decode=False)
            return (table.cast_column(column, decoded) if is_image else table), column
    columns = ", ".join(table.features)
    raise ValueError(f"'{where}' has no column of images, but {columns}; name another source")
