import importlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import datasets.config
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nvae_lightning.data import files as data_files
from nvae_lightning.data.readers import Source, Wanted, open_source, parquet

Read = Callable[[Source], list[np.ndarray]]

FEATURES = datasets.Features(
    {"label": datasets.ClassLabel(names=["cat", "dog"]), "picture": datasets.Image()}
)

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep caches in a temporary folder, without a network."""
    cache = tmp_path / "cache"
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "source"


def noise(*numbers: int) -> list[np.ndarray]:
    """Return one image per number."""
    return [
        np.random.default_rng(n).integers(256, size=(8, 9, 3), dtype=np.uint8) for n in numbers
    ]


def files(*numbers: int) -> list[bytes]:
    """Return the same images as PNGs."""
    buffers = [io.BytesIO() for _ in numbers]
    for image, buffer in zip(noise(*numbers), buffers, strict=True):
        Image.fromarray(image).save(buffer, "PNG")
    return [buffer.getvalue() for buffer in buffers]


def write_hub(path: Path, *numbers: int) -> None:
    """Write a shard as on the hub, with a description of its columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.fromarray(image) for image in noise(*numbers)]
    columns = {"label": [0] * len(numbers), "picture": pictures}
    datasets.Dataset.from_dict(columns, features=FEATURES).to_parquet(path)


def write_plain(path: Path, **columns: Any) -> None:
    """Write a shard without a description."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def structs(*numbers: int) -> list[dict[str, Any]]:
    return [{"bytes": file, "path": None} for file in files(*numbers)]


def test_shards_are_read_by_split_in_order(
    root: Path, cache: Path, wanted: Wanted, read: Read
) -> None:
    write_hub(root / "data" / "train-00001-of-00002.parquet", 2, 3)
    write_hub(root / "data" / "train-00000-of-00002.parquet", 0, 1)
    write_hub(root / "data" / "test-00000-of-00001.parquet", 4)
    (root / "README.md").write_text("a dataset card")
    (root / ".cache").mkdir()
    (root / ".cache" / "train-00000-of-00002.parquet").write_text("hidden")
    before = sorted(root.rglob("*"))
    splits = open_source(root, wanted)
    assert splits.format == "parquet"
    assert list(splits.sources) == ["train", "test"]
    np.testing.assert_array_equal(read(splits.sources["train"]), noise(0, 1, 2, 3))
    np.testing.assert_array_equal(read(splits.sources["test"]), noise(4))
    assert sorted(root.rglob("*")) == before
    assert cache.is_dir()


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.parquet", "validation.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("[odd] *name?/train.parquet", "[odd] *name?/test.parquet"),
    ],
)
def test_the_name_of_a_shard_or_its_folder_determines_its_split(
    train: str, test: str, root: Path, wanted: Wanted, read: Read
) -> None:
    write_hub(root / train, 0, 1)
    write_hub(root / test, 2)
    sources = open_source(root, wanted).sources
    np.testing.assert_array_equal(read(sources["train"]), noise(0, 1))
    np.testing.assert_array_equal(read(sources["test"]), noise(2))


@pytest.mark.parametrize("name", ["images.parquet", "train-00000-of-00001.parquet"])
def test_a_single_file_is_split_by_the_seed(
    name: str, root: Path, wanted: Wanted, read: Read
) -> None:
    write_hub(root / name, *range(8))
    sources = open_source(root / name, wanted).sources
    assert {name: len(source) for name, source in sources.items()} == {"train": 6, "test": 2}
    rows = wanted.split([f"{row:08d}" for row in range(8)], "it")
    for split, source in sources.items():
        assert source.names == [f"{row:08d}" for row in rows[split]]
        np.testing.assert_array_equal(read(source), noise(*rows[split]))


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
def test_columns_without_a_description_are_found(
    kind: str, root: Path, wanted: Wanted, read: Read
) -> None:
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        of_kind = {
            "struct": pa.array(structs(*numbers), STRUCT),
            "binary": pa.array(files(*numbers), pa.binary()),
            "large_binary": pa.array(files(*numbers), pa.large_binary()),
        }
        write_plain(root / f"{split}.parquet", label=[0] * len(numbers), image=of_kind[kind])
    sources = open_source(root, wanted).sources
    np.testing.assert_array_equal(read(sources["train"]), noise(0, 1))
    np.testing.assert_array_equal(read(sources["test"]), noise(2))


def test_an_image_that_is_given_by_its_path_is_read(
    root: Path, tmp_path: Path, wanted: Wanted, read: Read
) -> None:
    write_plain(root / "test.parquet", image=pa.array(structs(2), STRUCT))
    (root / "0.png").write_bytes(files(0)[0])
    paths = (str(root / "0.png"), "0.png")
    by_path = [{"bytes": None, "path": path} for path in paths]
    write_plain(root / "train.parquet", image=pa.array(structs(1) + by_path, STRUCT))
    np.testing.assert_array_equal(read(open_source(root, wanted).sources["train"]), noise(1, 0, 0))


def test_a_table_cannot_name_an_image_outside_its_folder(
    root: Path, tmp_path: Path, wanted: Wanted
) -> None:
    (tmp_path / "0.png").write_bytes(files(0)[0])
    write_plain(root / "test.parquet", image=pa.array(structs(2), STRUCT))
    (root / "link.png").symlink_to(tmp_path / "0.png")
    paths = (str(tmp_path / "0.png"), "../0.png", "link.png")
    by_path = [{"bytes": None, "path": path} for path in paths]
    write_plain(root / "train.parquet", image=pa.array(by_path, STRUCT))
    source = open_source(root, wanted).sources["train"]
    for index, path in enumerate(paths):
        with pytest.raises(ValueError, match=rf"^its file '{path}' is not in the folder of the"):
            source.image(index)


def test_a_table_that_would_become_many_times_larger_is_refused(
    root: Path, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "MAX_BYTES", 1 << 20)
    write_plain(root / "test.parquet", image=pa.array(structs(2), STRUCT))
    write_plain(root / "train.parquet", image=pa.array([bytes(1 << 21)], pa.binary()))
    with pytest.raises(ValueError, match=r"train\.parquet' has 2,.* more than 16 times; write it"):
        open_source(root, wanted)


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_a_repeated_dictionary_value_counts_once_per_row(
    kind: str, root: Path, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "MAX_BYTES", 1 << 20)
    large = files(0)[0] + bytes(1 << 16)
    array = pa.array([large] * 200, pa.binary())
    if kind == "struct":
        array = pa.array([{"bytes": large, "path": None}] * 200, STRUCT)
    write_plain(root / "test.parquet", image=array[:2])
    write_plain(root / "train.parquet", image=array)
    with pytest.raises(
        ValueError, match=r"train\.parquet' has 13,.* more than 16 times; write it"
    ):
        open_source(root, wanted)


def test_an_image_larger_than_the_bound_is_refused(
    root: Path, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "MAX_BYTES", 300)
    write_plain(root / "test.parquet", image=pa.array(files(2), pa.binary()))
    write_plain(root / "train.parquet", image=pa.array([bytes(301), bytes(200)], pa.binary()))
    source = open_source(root, wanted).sources["train"]
    with pytest.raises(ValueError, match=r"it is larger than 300 bytes, the limit"):
        source.image(0)
    with pytest.raises(OSError, match="cannot identify"):
        source.image(1)


def test_a_pickled_source_reads_the_same(root: Path, wanted: Wanted, read: Read) -> None:
    write_hub(root / "train.parquet", *range(8))
    source = open_source(root, wanted).sources["train"]
    before = read(source)
    np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(source))), before)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_forked_workers_read_the_same(
    root: Path, wanted: Wanted, read: Read, read_in_workers: Read
) -> None:
    write_hub(root / "train.parquet", *range(8))
    source = open_source(root, wanted).sources["train"]
    np.testing.assert_array_equal(read_in_workers(source), 4 * read(source))


def test_a_row_without_an_image_is_named(root: Path, wanted: Wanted) -> None:
    missing = [{"bytes": None, "path": None}, None]
    write_plain(root / "train.parquet", image=pa.array(structs(0) + missing, STRUCT))
    write_plain(root / "test.parquet", image=pa.array(structs(1), STRUCT))
    source = open_source(root, wanted).sources["train"]
    np.testing.assert_array_equal(source.image(0), noise(0)[0])
    for row in (1, 2):
        with pytest.raises(ValueError, match=rf"^row {row} has no image in its column 'image'$"):
            source.image(row)


def test_a_table_without_images_is_reported_with_its_columns(root: Path, wanted: Wanted) -> None:
    write_plain(root / "train.parquet", label=[0, 1], text=["a", "b"])
    message = rf"^'{root}' has no column of images, but label, text; name another source$"
    with pytest.raises(ValueError, match=message):
        open_source(root, wanted)


def test_a_single_image_cannot_be_split(root: Path, wanted: Wanted) -> None:
    write_hub(root / "train.parquet", 0)
    with pytest.raises(ValueError, match=rf"^'{root}' holds one image only"):
        open_source(root, wanted)


def test_a_missing_split_is_reported(root: Path, wanted: Wanted) -> None:
    write_hub(root / "test.parquet", 0)
    with pytest.raises(ValueError, match=r"has a split 'test' but no split 'train'; add 'train'$"):
        open_source(root, wanted)


@pytest.mark.parametrize("kept", [0, 20, -10])
def test_a_damaged_file_is_reported_in_one_line(kept: int, root: Path, wanted: Wanted) -> None:
    write_hub(root / "train.parquet", 0, 1)
    path = root / "train.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=rf"^'{root}' cannot be read as a dataset \(.+\); fetch it"
    ):
        open_source(root, wanted)


@pytest.mark.parametrize("name", ["hf://nobody/nothing", "hf://datasets/nobody/nothing"])
def test_a_hub_that_cannot_be_reached_is_reported_in_one_line(name: str, wanted: Wanted) -> None:
    message = (
        rf"^'{name}' cannot be read as a dataset \(.*nobody/nothing.*\); check its name and the"
    )
    with pytest.raises(ValueError, match=message) as caught:
        open_source(name, wanted)
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, datasets.Dataset]]:
    """Simulated hub, to which tests add datasets."""
    held: dict[str, dict[str, datasets.Dataset]] = {}
    monkeypatch.setattr(datasets, "load_dataset", held.__getitem__)
    return held


def in_memory(*numbers: int) -> datasets.Dataset:
    columns = {"label": [0] * len(numbers), "picture": structs(*numbers)}
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def test_a_dataset_of_the_hub_keeps_its_splits(
    hub: dict[str, dict[str, datasets.Dataset]], wanted: Wanted, read: Read
) -> None:
    hub["owner/name"] = {"train": in_memory(0, 1), "valid": in_memory(2), "test": in_memory(3)}
    for name in ("hf://owner/name", "hf://datasets/owner/name"):
        sources = open_source(name, wanted).sources
        assert list(sources) == ["train", "validation", "test"]
        np.testing.assert_array_equal(read(sources["validation"]), noise(2))


def test_a_dataset_of_the_hub_without_a_known_split_is_reported(
    hub: dict[str, dict[str, datasets.Dataset]], wanted: Wanted
) -> None:
    hub["owner/name"] = {"full": in_memory(0, 1), "extra": in_memory(2)}
    message = r"^'hf://owner/name' has no split 'train', but full, extra; name another$"
    with pytest.raises(ValueError, match=message):
        open_source("hf://owner/name", wanted)


def test_a_split_without_rows_is_reported(
    hub: dict[str, dict[str, datasets.Dataset]], wanted: Wanted
) -> None:
    hub["owner/name"] = {"train": in_memory(0), "test": in_memory(1).select([])}
    with pytest.raises(ValueError, match=r"^no images in the split 'test' of 'hf://owner/name'"):
        open_source("hf://owner/name", wanted)


def test_a_missing_package_is_reported_with_how_to_install_it(
    root: Path, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str, *_: Any) -> ModuleType:
        raise ModuleNotFoundError(f"No module named '{name}'")

    write_hub(root / "train.parquet", 0, 1)
    monkeypatch.setattr(importlib, "import_module", without)
    message = (
        r"requires the package datasets \(No .*install it: pip install 'nvae_lightning\[parquet\]"
    )
    for source in (root, "hf://owner/name"):
        with pytest.raises(ValueError, match=message):
            open_source(source, wanted)
