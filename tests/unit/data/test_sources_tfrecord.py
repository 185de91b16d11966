import importlib
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tfrecord import TFRecordWriter

from nvae_lightning.data.readers import Source, Wanted, open_source

Read = Callable[[Source], list[np.ndarray]]


def noise(split: str, side: int, shard: int) -> np.ndarray:
    """Draw the three images of a shard."""
    seed = [len(split), side, shard]
    return np.random.default_rng(seed).integers(256, size=(3, side, side, 3), dtype=np.uint8)


def write_shard(path: Path, images: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = TFRecordWriter(str(path))
    for image in images:
        features = {
            "shape": (list(image.shape), "int"),
            "data": (image.tobytes(), "byte"),
            "label": (0, "int"),
        }
        writer.write(features)
    writer.close()


def shard_name(split: str, resolution: int, shard: int) -> str:
    return f"{split}/{split}-r{resolution:02}-s-{shard:04}-of-0002.tfrecords"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Glow's layout: two shards per split and resolution (8 and 32 pixels)."""
    root = tmp_path / "celeba-tfr"
    for split in ("train", "validation"):
        for resolution in (3, 5):
            for shard in range(2):
                name = shard_name(split, resolution, shard)
                write_shard(root / name, noise(split, 2**resolution, shard))
    return root


def packed(root: Path) -> Path:
    with tarfile.open(root.with_suffix(".tar"), "w") as archive:
        archive.add(root, root.name)
    return root.with_suffix(".tar")


def packed_from_within(root: Path) -> Path:
    with tarfile.open(root.with_suffix(".tar"), "w") as archive:
        archive.add(root, ".")
    return root.with_suffix(".tar")


def as_it_is(root: Path) -> Path:
    return root


LAYOUTS = [as_it_is, packed, packed_from_within]
Layout = Callable[[Path], Path]


def wanted_at(size: int) -> Wanted:
    return Wanted(size, 0.5, split_seed=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "side"), [(4, 8), (8, 8), (9, 32), (32, 32), (64, 32)])
def test_records_of_the_smallest_sufficient_resolution_are_read_in_order(
    size: int, side: int, layout: Layout, root: Path, read: Read
) -> None:
    splits = open_source(layout(root), wanted_at(size))
    assert splits.format == "TFRecords"
    for name, split in (("train", "train"), ("test", "validation")):
        expected = np.concatenate([noise(split, side, shard) for shard in range(2)])
        np.testing.assert_array_equal(read(splits.sources[name]), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pickled_source_reads_the_same(
    layout: Layout, root: Path, wanted: Wanted, read: Read
) -> None:
    source = open_source(layout(root), wanted).sources["train"]
    before = read(source)
    np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(source))), before)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_forked_workers_do_not_share_a_position_in_the_archive(
    tmp_path: Path, wanted: Wanted, read: Read, read_in_workers: Read
) -> None:
    for split in ("train", "validation"):
        images = np.concatenate([noise(split, 128, shard) for shard in range(20)])
        write_shard(tmp_path / "tfr" / shard_name(split, 7, 0), images)
    source = open_source(packed(tmp_path / "tfr"), wanted).sources["train"]
    np.testing.assert_array_equal(read_in_workers(source), 4 * read(source))


def test_shards_that_name_no_resolution_are_read(
    tmp_path: Path, wanted: Wanted, read: Read
) -> None:
    write_shard(tmp_path / "train.tfrecord", noise("train", 8, 0))
    write_shard(tmp_path / "test-00.tfrecord", noise("test", 8, 0))
    sources = open_source(tmp_path, wanted).sources
    np.testing.assert_array_equal(read(sources["train"]), noise("train", 8, 0))
    np.testing.assert_array_equal(read(sources["test"]), noise("test", 8, 0))


def test_grey_records_are_read(tmp_path: Path, wanted: Wanted, read: Read) -> None:
    greys = noise("train", 8, 0)[..., :1]
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.tfrecords", greys)
    source = open_source(tmp_path, wanted).sources["test"]
    np.testing.assert_array_equal(read(source), greys[..., 0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("end", [-1, -4, -5, -100, 11, 5])
def test_a_truncated_shard_is_named(end: int, layout: Layout, root: Path, wanted: Wanted) -> None:
    name = shard_name("train", 3, 1)
    (root / name).write_bytes((root / name).read_bytes()[:end])
    message = rf"^'.*celeba-tfr.*': the shard .*{name} is damaged at byte \d+; fetch it again$"
    with pytest.raises(ValueError, match=message):
        open_source(layout(root), wanted)


@pytest.mark.parametrize("place", [0, 7, 8, 11])
def test_a_flipped_bit_in_a_header_is_found_immediately(
    place: int, root: Path, wanted: Wanted
) -> None:
    path = root / shard_name("train", 3, 0)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"train-r03-s-0000-of-0002\.tfrecords is damaged at byte"
    ):
        open_source(root, wanted)


@pytest.mark.parametrize("part", ["data", "checksum"])
def test_a_flipped_bit_in_an_image_is_found_where_it_is_read(
    part: str, root: Path, wanted: Wanted, read: Read
) -> None:
    path = root / shard_name("train", 3, 0)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", content)
    content[12 + length // 2 if part == "data" else 12 + length] ^= 1
    path.write_bytes(content)
    source = open_source(root, wanted).sources["train"]
    with pytest.raises(
        ValueError, match=r"^its checksum does not match its bytes; fetch the shard"
    ):
        source.image(0)
    np.testing.assert_array_equal(source.image(1), noise("train", 8, 0)[1])


def test_records_of_another_kind_are_reported_with_their_features(
    tmp_path: Path, wanted: Wanted
) -> None:
    for split in ("train", "test"):
        writer = TFRecordWriter(str(tmp_path / f"{split}.tfrecords"))
        writer.write({"image/encoded": (b"jpeg", "byte")})
        writer.close()
    source = open_source(tmp_path, wanted).sources["train"]
    with pytest.raises(ValueError, match=r"^the record has no feature 'shape', but image/encoded"):
        source.image(0)


def test_a_missing_split_is_reported(root: Path, wanted: Wanted) -> None:
    shutil.rmtree(root / "validation")
    with pytest.raises(ValueError, match=r"'train' but no split 'test'; add 'test'$"):
        open_source(root, wanted)


def test_shards_of_no_split_are_reported(tmp_path: Path, wanted: Wanted) -> None:
    write_shard(tmp_path / "images.tfrecords", noise("train", 8, 0))
    with pytest.raises(
        ValueError, match=r"none in a folder train or validation; move them there$"
    ):
        open_source(tmp_path, wanted)


def test_an_empty_shard_is_an_empty_split(tmp_path: Path, wanted: Wanted) -> None:
    write_shard(tmp_path / "train.tfrecords", noise("train", 8, 0))
    write_shard(tmp_path / "test.tfrecords", noise("train", 8, 0)[:0])
    with pytest.raises(ValueError, match=rf"^no images in the split 'test' of '{tmp_path}'"):
        open_source(tmp_path, wanted)


@pytest.mark.parametrize("missing", ["crc32c", "tfrecord.example_pb2"])
def test_a_missing_package_is_reported_with_how_to_install_it(
    missing: str, root: Path, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.import_module

    def without(name: str, package: str | None = None) -> ModuleType:
        if name == missing:
            raise ModuleNotFoundError(f"No module named '{name}'")
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    message = (
        rf"requires the package {missing} \(No .*\); install it: pip install 'nvae_lightning\[tf"
    )
    with pytest.raises(ValueError, match=message):
        open_source(root, wanted).sources["train"].image(0)
