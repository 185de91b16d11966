"""Parquet shards in the layouts of the Hugging Face hub, from files or by name."""

import glob
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from nvae_lightning.data.files import (
    MAX_BYTES,
    check_bytes,
    leads_out,
    open_regular,
    read_regular,
)
from nvae_lightning.data.image_formats import open_image
from nvae_lightning.data.messages import one_line
from nvae_lightning.data.readers.base import (
    Source,
    Splits,
    Wanted,
    check_splits,
    require,
    split_name,
)
from nvae_lightning.data.readers.container import Container, File, Folder
from nvae_lightning.data.summary import Outcome

HUB_PREFIX = "hf://"

_MAX_RATIO = 16  # of a row group's size to its compressed size; encoded images have 1


class Table(Source):
    """Some rows of a table with a column of images.

    Args:
        table: A ``datasets.Dataset`` with encoded images in its column `column`.
        column: Name of the column.
        rows: Indices of the rows.
        folders: Folders for the image files that rows may name instead of containing an image.
    """

    def __init__(
        self,
        table: Any,  # noqa: ANN401
        column: str,
        rows: Sequence[int],
        folders: Sequence[Path],
    ) -> None:
        super().__init__([f"{row:08d}" for row in rows])
        self.folders = folders
        self.table = table
        self.column = column
        self.rows = rows

    def image(self, index: int) -> Image.Image:
        """Return an image.

        Raises:
            ValueError: If the row has none.
        """
        value = self.table[self.rows[index]][self.column]
        if isinstance(value, dict):  # the hub's folders of images only have a path
            value = value["bytes"] or (value.get("path") and self._read(value["path"]))
        if not value:
            raise ValueError(f"row {self.rows[index]} has no image in its column '{self.column}'")
        check_bytes(len(value))
        return open_image(value)

    def _read(self, path: str) -> bytes:
        found = [folder / path for folder in self.folders if not leads_out(folder / path, folder)]
        if not found:
            raise ValueError(f"its file '{path}' is not in the folder of the table, nor below it")
        return read_regular(found[0])


def find(container: Container, wanted: Wanted) -> Splits | None:
    """Find the shards of a folder, or a single one.

    Raises:
        ValueError: If they are unreadable, without images, or without a split.
    """
    path = container.path
    folder = path if isinstance(container, Folder) else path.parent
    names = [name for name in container.names if name.lower().endswith(".parquet")]
    if not names or not isinstance(container, Folder | File):
        return None
    by_split: dict[str, list[str]] = {}
    for shard in (folder / name for name in names):
        _check_sizes(shard, path)
        file = shard.name.partition("-")[0].partition(".")[0]
        name = split_name(file) or split_name(shard.parent.name) or "train"
        by_split.setdefault(name, []).append(glob.escape(str(shard)))
    options = {"data_files": by_split, "batch_size": 100}  # rows that are decompressed together
    return _load(str(path), wanted, [folder], container.unread(names), "parquet", **options)


def from_hub(name: str, wanted: Wanted) -> Splits:
    """Load a dataset of the hub, given as ``hf://owner/name``.

    Raises:
        ValueError: If it is unreadable, without images, or without a split.
    """
    datasets = require("datasets", "parquet")
    hub = require("huggingface_hub.constants", "parquet")
    folders = [Path(datasets.config.HF_DATASETS_CACHE), Path(hub.HF_HUB_CACHE)]
    found = name.removeprefix(HUB_PREFIX).removeprefix("datasets/")
    return _load(name, wanted, folders, [], found)


def _check_sizes(shard: Path, where: Path) -> None:
    """Check the size of each row group before it is decompressed.

    Raises:
        ValueError: If the file is unreadable, or would become many times larger.
    """
    require("datasets", "parquet")
    parquet = require("pyarrow.parquet", "parquet")
    try:
        with open_regular(shard) as file:
            metadata = parquet.read_metadata(file)
    except Exception as error:  # from pyarrow or the system
        raise ValueError(
            f"'{where}' cannot be read as a dataset ({shard.name}: {one_line(error)}); fetch it "
            "again"
        ) from error
    size = shard.stat().st_size
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        packed = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        most = max(MAX_BYTES, _MAX_RATIO * min(packed, size))
        unpacked = group.total_byte_size
        if unpacked <= most:
            unpacked += sum(
                _repeated_bytes(parquet, shard, number, group.column(i))
                for i in range(group.num_columns)
            )
        if unpacked > most:
            raise ValueError(
                f"'{shard}' has {unpacked:,} bytes in {packed:,} compressed ones, "
                f"more than {_MAX_RATIO} times; write it again in smaller row groups"
            )


def _repeated_bytes(parquet: ModuleType, shard: Path, group: int, column: Any) -> int:  # noqa: ANN401
    """Return a bound on the bytes of a column whose values are stored once per dictionary."""
    if not column.has_dictionary_page or column.physical_type != "BYTE_ARRAY":
        return 0
    leaf = column.path_in_schema
    with parquet.ParquetFile(shard, read_dictionary=[leaf]) as file:
        batch = next(file.iter_batches(1, row_groups=[group], columns=[leaf]), None)
    array = None if batch is None or not batch.num_columns else batch.column(0)
    while array is not None and not hasattr(array, "dictionary"):
        array = next(iter(array.flatten()), None) if array.type.num_fields else None
    if array is None:
        return 0
    sizes = [len(value) for value in array.dictionary.to_pylist() if value is not None]
    return column.num_values * max(sizes, default=0)


def _load(
    where: str,
    wanted: Wanted,
    folders: Sequence[Path],
    left_out: Sequence[Outcome],
    *arguments: str,
    **options: object,
) -> Splits:
    datasets = require("datasets", "parquet")
    try:
        tables = datasets.load_dataset(*arguments, **options)
    except Exception as error:  # from datasets, pyarrow, or one of three HTTP clients
        reasons = ": ".join(str(e) for e in (error, error.__cause__) if e is not None)
        reason = " ".join(reasons.split())
        remedy = (
            "check its name and the network" if where.startswith(HUB_PREFIX) else "fetch it again"
        )
        raise ValueError(f"'{where}' cannot be read as a dataset ({reason}); {remedy}") from error
    by_split = {name: table for key, table in tables.items() if (name := split_name(key))}
    if not by_split:
        raise ValueError(f"'{where}' has no split 'train', but {', '.join(tables)}; name another")
    others = [key for key in tables if not split_name(key)]
    left_out = [*left_out, *(Outcome("", key, "ignored", "unused split") for key in others)]
    parts = {name: _with_images(table, where) for name, table in by_split.items()}
    if set(parts) == {"train"}:  # nothing is held out
        table, column = parts["train"]
        rows = wanted.split([f"{row:08d}" for row in range(len(table))], f"'{where}'")
        sources = {name: Table(table, column, chosen, folders) for name, chosen in rows.items()}
    else:
        sources = {
            name: Table(table, column, range(len(table)), folders)
            for name, (table, column) in check_splits(parts, f"'{where}'").items()
        }
    return Splits("parquet", sources, left_out)


def _with_images(table: Any, where: str) -> tuple[Any, str]:  # noqa: ANN401
    """Find the column of images, and turn off its decoding, which `Decoder` does."""
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
