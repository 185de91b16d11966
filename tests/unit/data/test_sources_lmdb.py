import importlib
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lmdb
import numpy as np
import pytest
from PIL import Image

from nvae_lightning.data.readers import Source, Wanted, open_source

Read = Callable[[Source], list[np.ndarray]]

COUNTS = {"train": 12, "validation": 5}


def noise(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).integers(256, size=(count, *shape), dtype=np.uint8)


def encoded(image: np.ndarray, file_format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, file_format)
    return file.getvalue()


def write(path: Path, entries: dict[bytes, bytes]) -> None:
    with (
        lmdb.open(str(path), map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in entries.items():
            transaction.put(key, value)


def write_bare(root: Path, *shape: int) -> None:
    for split, count in COUNTS.items():
        images = noise(count, *shape)
        entries = {str(index).encode(): image.tobytes() for index, image in enumerate(images)}
        write(root / f"{split}.lmdb", entries)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Databases of raw pixels with more than ten keys: b"10" sorts before b"2"."""
    write_bare(tmp_path, 8, 8, 3)
    return tmp_path


def test_raw_pixels_are_read_in_numerical_order(root: Path, wanted: Wanted, read: Read) -> None:
    before = sorted(root.rglob("*"))
    splits = open_source(root, wanted)
    assert splits.format == "LMDB"
    assert list(splits.sources) == ["train", "test"]
    np.testing.assert_array_equal(read(splits.sources["train"]), noise(12, 8, 8, 3))
    np.testing.assert_array_equal(read(splits.sources["test"]), noise(5, 8, 8, 3))
    assert sorted(root.rglob("*")) == before


def test_raw_grey_pixels_are_read(tmp_path: Path, wanted: Wanted, read: Read) -> None:
    write_bare(tmp_path, 8, 8)
    source = open_source(tmp_path, wanted).sources["train"]
    np.testing.assert_array_equal(read(source), noise(12, 8, 8))


@pytest.mark.parametrize(
    "file_format", ["JPEG", "PNG", "BMP"]
)  # all BMP files have the same length
def test_image_files_are_read(
    file_format: str, tmp_path: Path, wanted: Wanted, read: Read
) -> None:
    files = {}
    for split, count in COUNTS.items():
        files[split] = [encoded(image, file_format) for image in noise(count, 9, 10, 3)]
        write(tmp_path / split, {f"{n:05}".encode(): file for n, file in enumerate(files[split])})
    source = open_source(tmp_path, wanted).sources["train"]
    expected = [np.asarray(Image.open(io.BytesIO(file))) for file in files["train"]]
    np.testing.assert_array_equal(read(source), expected)


def test_keys_may_be_any_bytes(tmp_path: Path, wanted: Wanted, read: Read) -> None:
    images = noise(3, 8, 8, 3)
    keys = (b"\x00\xff", b"a", b"caf\xe9")
    for split in COUNTS:
        entries = {key: image.tobytes() for key, image in zip(keys, images, strict=True)}
        write(tmp_path / split, entries)
    np.testing.assert_array_equal(read(open_source(tmp_path, wanted).sources["train"]), images)


def test_a_pickled_source_reads_the_same(root: Path, wanted: Wanted, read: Read) -> None:
    source = open_source(root, wanted).sources["train"]
    before = read(source)
    np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(source))), before)


def test_a_source_is_opened_twice(root: Path, wanted: Wanted, read: Read) -> None:
    first, second = (open_source(root, wanted).sources["train"] for _ in range(2))
    np.testing.assert_array_equal(read(first), read(second))


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_forked_workers_read_what_this_process_has_read(
    root: Path, wanted: Wanted, read: Read, read_in_workers: Read
) -> None:
    source = open_source(root, wanted).sources["train"]
    np.testing.assert_array_equal(read_in_workers(source), 4 * read(source))


def test_a_value_of_another_length_cannot_be_decoded_but_its_neighbours_can(
    root: Path, wanted: Wanted
) -> None:
    pixels = noise(20, 8, 8, 3)
    entries = {str(n).encode(): image.tobytes() for n, image in enumerate(pixels)}
    write(root / "train.lmdb", {**entries, b"18": b"short"})
    source = open_source(root, wanted).sources["train"]
    np.testing.assert_array_equal(source.image(17), pixels[17])
    with pytest.raises(ValueError, match="cannot reshape array of size 5"):
        source.image(18)


@pytest.mark.parametrize("content", [b"", b"no database", bytes(10_000)])
def test_an_invalid_database_is_named(content: bytes, root: Path, wanted: Wanted) -> None:
    path = root / "train.lmdb"
    (path / "data.mdb").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^'{path}' is a damaged LMDB database \(.+\); fetch it"
    ):
        open_source(root, wanted)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_a_truncated_database_is_named(kept: float, root: Path, wanted: Wanted) -> None:
    data = root / "train.lmdb" / "data.mdb"
    write(data.parent, {str(n).encode(): bytes(3 * 64 * 64) for n in range(12)})
    os.truncate(data, int(kept * data.stat().st_size))
    message = rf"^'{data.parent}' is a damaged LMDB database \(it is shorter than its .+\); fetch"
    with pytest.raises(ValueError, match=message):
        open_source(root, wanted)


def test_an_empty_database_is_named(root: Path, wanted: Wanted) -> None:
    shutil.rmtree(root / "validation.lmdb")
    write(root / "test.lmdb", {})
    with pytest.raises(
        ValueError, match=rf"^no images in the split 'test' of '{root}'; fetch it again"
    ):
        open_source(root, wanted)


def test_a_missing_split_is_reported(root: Path, wanted: Wanted) -> None:
    with pytest.raises(ValueError, match=r"'train' but no split 'test'; add 'test'$"):
        open_source(root / "train.lmdb", wanted)


def test_a_duplicate_split_is_reported_by_name(root: Path, wanted: Wanted) -> None:
    shutil.copytree(root / "train.lmdb", root / "train_8x8.lmdb")
    with pytest.raises(ValueError, match=r"the split 'train' twice, '.*train\.lmdb' and '.*_8x8"):
        open_source(root, wanted)


def test_a_database_without_a_split_in_its_name_is_reported(root: Path, wanted: Wanted) -> None:
    for split in COUNTS:
        (root / f"{split}.lmdb").rename(root / f"my_{split}.lmdb")
    message = r"my_train\.lmdb' does not name its split; name the databases train\.lmdb"
    with pytest.raises(ValueError, match=message):
        open_source(root, wanted)


def test_a_missing_package_is_reported_with_how_to_install_it(
    root: Path, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str, *_: Any) -> ModuleType:
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(importlib, "import_module", without)
    message = (
        r"requires the package lmdb \(No .*\); install it: pip install 'nvae_lightning\[lmdb\]'$"
    )
    with pytest.raises(ValueError, match=message):
        open_source(root, wanted)
