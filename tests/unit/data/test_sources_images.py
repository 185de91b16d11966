import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvae_lightning.data.readers import Source, Wanted, open_source

Read = Callable[[Source], list[np.ndarray]]

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "cifar10_jpeg"

NAMES = ("train/cat/2.png", "train/cat/1.png", "train/ant/3.png", "val/x.png", "test/y.png")
SPLIT = {
    "train": [20, 10, 0],
    "validation": [30],
    "test": [40],
}  # greys of NAMES in the order of their paths


def write_greys(root: Path, *names: str) -> None:
    """Write one 8x8 image per name, with the greys 0, 10, 20, ..."""
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * index).save(root / name)


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def zipped_with_its_name(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path


def tarred(folder: Path) -> Path:
    with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
        archive.add(folder, ".")  # like `tar -C folder .`: every name begins with ./
    return folder.with_suffix(".tar")


def tarred_with_its_name(folder: Path) -> Path:
    with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
        archive.add(folder, folder.name)
    return folder.with_suffix(".tar")


def as_it_is(folder: Path) -> Path:
    return folder


def from_above(folder: Path) -> Path:
    (folder.parent / "README").write_text("beside the folder")
    return folder.parent


LAYOUTS = [as_it_is, from_above, zipped, zipped_with_its_name, tarred, tarred_with_its_name]
Layout = Callable[[Path], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder with nothing beside it."""
    folder = tmp_path / "above" / "photos"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def greys(read: Read) -> Callable[[Source], list[int]]:
    """Reader of the greys of all images."""
    return lambda source: [int(image[0, 0]) for image in read(source)]


Greys = Callable[[Source], list[int]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_named_after_splits_are_the_splits_in_the_order_of_their_paths(
    layout: Layout, folder: Path, wanted: Wanted, greys: Greys
) -> None:
    write_greys(folder, *NAMES)
    splits = open_source(layout(folder), wanted)
    assert splits.format == "image files"
    assert {name: greys(source) for name, source in splits.sources.items()} == SPLIT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_seeded_split_is_the_same_in_every_layout(
    layout: Layout, folder: Path, wanted: Wanted, greys: Greys
) -> None:
    names = [f"{index:02}.png" for index in range(12)]
    write_greys(folder, *names[6:], *(f"nested/{name}" for name in names[:6]))
    splits = open_source(layout(folder), wanted)
    test = sorted(name[-6:] for name in splits.sources["test"].names)
    assert test == ["05.png", "08.png", "10.png"]
    assert sorted(greys(splits.sources["test"])) == [20, 40, 110]
    assert len(splits.sources["train"]) == 9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_known_suffix_is_read_and_other_files_are_skipped(
    layout: Layout, folder: Path, wanted: Wanted, read: Read
) -> None:
    names = [
        *("a.jpg", "b.JPEG", "c/d.png", "c/e.bmp", "c/f/g.gif", "h.tif", "i.tiff", "j.webp"),
        *("k.ppm", "l.pgm"),
    ]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if name.endswith("pgm") else "RGB", (9, 9), "white").save(folder / name)
    for name in (
        *("labels.csv", "train.npy", "train.json", "no_suffix", ".DS_Store", "._a.jpg"),
        *("__MACOSX/c/._d.png", "__MACOSX/e.png", ".thumbnails/a.jpg", "c/.hidden/b.jpg"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no image")
    sources = open_source(layout(folder), wanted).sources.values()
    found = [name.removeprefix("photos/") for source in sources for name in source.names]
    assert sorted(found) == sorted(names)
    assert all(image.shape[:2] == (9, 9) for source in sources for image in read(source))


@pytest.mark.parametrize("test", ["test", "val", "valid", "validation"])
def test_any_name_of_a_held_out_folder_makes_it_the_test_split(
    test: str, tmp_path: Path, wanted: Wanted, greys: Greys
) -> None:
    write_greys(tmp_path, "train/a.png", f"{test}/b.png")
    sources = open_source(tmp_path, wanted).sources
    assert {name: greys(source) for name, source in sources.items()} == {
        "train": [0],
        "test": [10],
    }


@pytest.mark.parametrize("archive", [zipped, zipped_with_its_name, tarred])
def test_archives_named_after_splits_are_the_splits(
    archive: Layout, tmp_path: Path, wanted: Wanted, greys: Greys
) -> None:
    write_greys(tmp_path / "images", "0.png", "train_32x32/b.png", "train_32x32/a.png")
    write_greys(tmp_path / "images", "valid_32x32/c.png")
    (tmp_path / "source" / "below").mkdir(parents=True)
    for name in ("train_32x32", "valid_32x32"):
        path = archive(tmp_path / "images" / name)
        path.rename(tmp_path / "source" / "below" / path.name)
    splits = open_source(tmp_path / "source", wanted)
    assert splits.format == "archives of images"
    assert greys(splits.sources["train"]) == [20, 10]
    assert greys(splits.sources["test"]) == [0]


def test_folders_take_precedence_over_archives_beside_them(folder: Path, wanted: Wanted) -> None:
    write_greys(folder, *NAMES)
    zipped(folder / "train")
    splits = open_source(folder, wanted)
    assert splits.format == "image files"
    assert set(splits.sources) == set(SPLIT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pickled_source_reads_the_same(
    layout: Layout, folder: Path, wanted: Wanted, read: Read
) -> None:
    write_greys(folder, *NAMES)
    source = open_source(layout(folder), wanted).sources["train"]
    before = read(source)  # opens its files
    np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(source))), before)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("layout", [zipped, tarred])
def test_forked_workers_do_not_share_a_position_in_an_archive(
    layout: Layout, folder: Path, wanted: Wanted, read: Read, read_in_workers: Read
) -> None:
    for index in range(64):
        noise = np.random.default_rng(index).integers(256, size=(256, 256), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    source = open_source(layout(folder), wanted).sources["train"]
    np.testing.assert_array_equal(read_in_workers(source), 4 * read(source))


def test_of_two_tar_members_with_one_name_the_last_is_read(
    folder: Path, wanted: Wanted, greys: Greys
) -> None:
    write_greys(folder, "train/a.png", "test/b.png")
    path = tarred(folder)
    write_greys(folder, "unused.png", "train/a.png")
    with tarfile.open(path, "a") as archive:
        archive.add(folder / "train", "train")
    assert greys(open_source(path, wanted).sources["train"]) == [10]


def test_an_image_stored_as_a_link_in_a_tar_is_read(
    folder: Path, wanted: Wanted, greys: Greys
) -> None:
    write_greys(folder, "train/a.png", "test/b.png")
    os.link(folder / "train/a.png", folder / "train/c.png")
    assert greys(open_source(tarred(folder), wanted).sources["train"]) == [0, 0]


def test_images_with_names_that_are_not_utf8_are_read(
    tmp_path: Path, wanted: Wanted, greys: Greys
) -> None:
    write_greys(tmp_path, "a.png", "caf\udce9.png")
    sources = open_source(tmp_path, wanted).sources
    assert sorted(greys(sources["train"]) + greys(sources["test"])) == [0, 10]


def test_a_missing_source_is_reported(tmp_path: Path, wanted: Wanted) -> None:
    with pytest.raises(ValueError, match=rf"^'{tmp_path / 'nowhere'}' does not exist$"):
        open_source(tmp_path / "nowhere", wanted)


@pytest.mark.parametrize(("present", "absent"), [("train", "test"), ("test", "train")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_split_is_reported(
    layout: Layout, present: str, absent: str, folder: Path, wanted: Wanted
) -> None:
    write_greys(folder, f"{present}/a.png", "other/b.png")
    message = rf"has a split '{present}' but no split '{absent}'; add '{absent}', or rename"
    with pytest.raises(ValueError, match=message):
        open_source(layout(folder), wanted)


def test_a_missing_split_of_archives_is_reported(folder: Path, wanted: Wanted) -> None:
    write_greys(folder / "train", "a.png")
    zipped(folder / "train").rename(folder.parent / "train_32x32.zip")
    (folder / "train" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"'train' but no split 'test'; add 'test'$"):
        open_source(folder.parent, wanted)


@pytest.mark.parametrize("resolution", ["_64x64", "-64x64", "ing"])
def test_two_folders_for_one_split_are_reported(
    resolution: str, tmp_path: Path, wanted: Wanted
) -> None:
    write_greys(tmp_path, "train/a.png", f"train{resolution}/b.png", "test/c.png")
    message = rf"the split 'train' twice, 'train' and 'train{resolution}'; remove one"
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, wanted)


def test_two_archives_for_one_split_are_reported(tmp_path: Path, wanted: Wanted) -> None:
    for name in ("train_32x32", "train_64x64", "valid_32x32"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w"):
            pass
    message = r"the split 'train' twice, '.*train_32x32\.zip' and '.*train_64x64\.zip'"
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, wanted)


def test_an_empty_split_is_reported(tmp_path: Path, wanted: Wanted) -> None:
    write_greys(tmp_path, "train/a.png")
    (tmp_path / "test").mkdir()
    with pytest.raises(
        ValueError, match=rf"^no images in the split 'test' of '{tmp_path}'; .* add"
    ):
        open_source(tmp_path, wanted)


def test_an_archive_without_images_is_reported(tmp_path: Path, wanted: Wanted) -> None:
    write_greys(tmp_path / "images", "train/a.png", "test/b.txt.png")
    (tmp_path / "images/test/b.txt.png").rename(tmp_path / "images/test/b.txt")
    for name in ("train", "test"):
        zipped(tmp_path / "images" / name).rename(tmp_path / f"{name}.zip")
    (tmp_path / "images/train/a.png").unlink()
    with pytest.raises(
        ValueError, match=rf"^no images in the split 'test' of '{tmp_path}'; .* add"
    ):
        open_source(tmp_path, wanted)


def test_a_single_image_cannot_be_split(tmp_path: Path, wanted: Wanted) -> None:
    write_greys(tmp_path, "a.png")
    with pytest.raises(ValueError, match=rf"^'{tmp_path}' holds one image only, .* add images"):
        open_source(tmp_path, wanted)


@pytest.mark.parametrize(
    ("files", "held"),
    [
        ([], "nothing"),
        (["notes.txt"], r"notes\.txt"),
        (["a", "b", "c", "d", "e", "f"], "a, b, c, d, e and more"),
    ],
)
def test_a_folder_without_images_is_reported_with_its_content(
    files: list[str], held: str, tmp_path: Path, wanted: Wanted
) -> None:
    for name in files:
        (tmp_path / name).write_text("no image")
    message = rf"^no images in '{tmp_path}' \(which holds {held}\); give files .* \.jpg, .*zip"
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, wanted)


@pytest.mark.parametrize("name", ["notes.txt", "photos.rar"])
def test_a_file_of_another_kind_is_reported(name: str, tmp_path: Path, wanted: Wanted) -> None:
    (tmp_path / name).write_text("no archive")
    with pytest.raises(ValueError, match=rf"^no images in '.*' \(which holds {name}\)"):
        open_source(tmp_path / name, wanted)


@pytest.mark.parametrize("layout", [zipped, tarred])
@pytest.mark.parametrize("damage", ["empty", "text", "half"])
def test_a_damaged_archive_is_reported(
    damage: str, layout: Layout, folder: Path, wanted: Wanted
) -> None:
    write_greys(folder, *NAMES)
    path = layout(folder)
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"hello", "half": content[: len(content) // 2]}[damage]
    )
    with pytest.raises(
        ValueError, match=rf"^'{path}' is a damaged archive \(.+\); fetch it again$"
    ):
        open_source(path, wanted)


def test_a_tar_that_ends_or_is_damaged_between_two_images_is_reported(
    folder: Path, wanted: Wanted
) -> None:
    write_greys(folder, *NAMES)
    path = tarred(folder)
    with tarfile.open(path) as archive:
        middle = archive.getmember("./train/cat/1.png").offset
    content = path.read_bytes()
    flipped = content[: middle + 20] + b"X" + content[middle + 21 :]
    for damaged in (content[:middle], content[: middle + 100], flipped):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"is a damaged archive \(.*\b{middle}\)|unexpected"):
            open_source(path, wanted)


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.bz2", "TAR.XZ", "tar.zst"])
def test_a_compressed_tar_is_refused(suffix: str, tmp_path: Path, wanted: Wanted) -> None:
    path = tmp_path / f"photos.v2.{suffix}"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^'{path}' is compressed; uncompress it, or unpack it"):
        open_source(path, wanted)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_damaged_image_cannot_be_decoded_but_its_neighbours_can(
    suffix: str, damage: str, tmp_path: Path, wanted: Wanted, read: Read
) -> None:
    write_greys(tmp_path, "train/a.png", "test/b.png")
    path = tmp_path / "train" / f"broken.{suffix}"
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage]
    path.write_bytes(damaged)
    source = open_source(tmp_path, wanted).sources["train"]
    with source.image(0) as image:
        assert np.asarray(image).max() == 0
    with pytest.raises(OSError, match=r"truncated|cannot identify"):
        np.asarray(source.image(1))


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="requires the folder of CIFAR-10 JPEGs beside the checkout"
)
def test_a_real_folder_of_photographs_is_read(wanted: Wanted, read: Read) -> None:
    sources = open_source(SHARED, wanted).sources
    mean = np.mean([image.mean((0, 1)) for image in read(sources["test"])], 0) / 255
    # The published means of CIFAR-10's channels; this folder contains a sample of its images.
    np.testing.assert_allclose(mean, [0.491, 0.482, 0.447], rtol=0, atol=0.02)
