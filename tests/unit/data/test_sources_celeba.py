import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvae_lightning.data.readers import Source, Wanted, open_source

Read = Callable[[Source], list[np.ndarray]]

IMAGES = "celeba/img_align_celeba"
PARTITION = "celeba/list_eval_partition.txt"
SPLITS = {"000001.jpg": 0, "000002.jpg": 0, "000003.jpg": 2, "000004.jpg": 1, "000005.jpg": 0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """CelebA's layout: image n has grey 40 n, and one image is in no split."""
    (tmp_path / IMAGES).mkdir(parents=True)
    for number in range(1, 7):
        path = tmp_path / IMAGES / f"{number:06}.jpg"
        Image.new("RGB", (178, 218), (40 * number,) * 3).save(path)
    lines = [f"{name} {split}\n" for name, split in SPLITS.items()]
    (tmp_path / PARTITION).write_text("".join(lines))
    return tmp_path


def zip_images(root: Path) -> None:
    with zipfile.ZipFile(root / f"{IMAGES}.zip", "w") as archive:
        for path in sorted((root / IMAGES).iterdir()):
            archive.write(path, f"img_align_celeba/{path.name}")
            path.unlink()
    (root / IMAGES).rmdir()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("below", ["", "celeba"])
def test_the_published_split_is_used(
    below: str, zipped: bool, root: Path, wanted: Wanted, read: Read
) -> None:
    if zipped:
        zip_images(root)
    splits = open_source(root / below, wanted)
    assert splits.format == "CelebA"
    greys = {
        name: [int(image.mean()) for image in read(source)]
        for name, source in splits.sources.items()
    }
    assert greys == {"train": [40, 80, 200], "validation": [160], "test": [120]}
    train = splits.sources["train"]
    np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(train))), read(train))


@pytest.mark.parametrize("zipped", [False, True])
def test_missing_images_are_counted_and_the_first_is_named(
    zipped: bool, root: Path, wanted: Wanted
) -> None:
    for name in ("000002.jpg", "000004.jpg"):
        (root / IMAGES / name).unlink()
    if zipped:
        zip_images(root)
    message = (
        r"^2 images that '.*partition\.txt' names are not in '.*', the first being 000002\.jpg"
    )
    with pytest.raises(ValueError, match=message):
        open_source(root, wanted)


def test_a_partition_without_images_is_reported(root: Path, wanted: Wanted) -> None:
    zip_images(root)
    (root / f"{IMAGES}.zip").unlink()
    message = r"but no img_align_celeba\.zip or folder img_align_celeba; add either$"
    with pytest.raises(ValueError, match=message):
        open_source(root, wanted)


@pytest.mark.parametrize(
    "line", [b"000006.jpg", b"000006.jpg 3", b"000006.jpg 0 1", b"", b"\xff\0"]
)
def test_a_damaged_line_is_shown(line: bytes, root: Path, wanted: Wanted) -> None:
    with (root / PARTITION).open("ab") as file:
        file.write(line + b"\n")
    shown = line.decode(errors="replace").replace("\0", r"\\x00")
    message = rf"has a line '{shown}', not an image and 0, 1 or 2; fetch the file again$"
    with pytest.raises(ValueError, match=message):
        open_source(root, wanted)


def test_a_truncated_partition_is_reported(root: Path, wanted: Wanted) -> None:
    lines = (root / PARTITION).read_text().splitlines(keepends=True)
    (root / PARTITION).write_text("".join(lines[:2]))
    with pytest.raises(
        ValueError, match=r"^no images in the split 'validation' of '.*'; fetch it"
    ):
        open_source(root, wanted)


def test_a_damaged_zip_is_reported(root: Path, wanted: Wanted) -> None:
    zip_images(root)
    path = root / f"{IMAGES}.zip"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"^'{path}' is a damaged archive"):
        open_source(root, wanted)
